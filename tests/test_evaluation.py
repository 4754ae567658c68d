from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from conftest import EVERY_SHAPE, build_model
from weightpatch import ModelPair, patched
from weightpatch.arithmetic import word_problems
from weightpatch.errors import PromptError
from weightpatch.evaluation import Evaluation, evaluate, judge
from weightpatch.generation import N_TOKENS_AT_ONCE, Generation, generate
from weightpatch.programming import coding_tasks
from weightpatch.prompts import tokenize
from weightpatch.statistics import pass_rate
from weightpatch.suites import Check, Problem, load_suite


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return ModelPair.from_pretrained("tiny:base", "tiny:specialized")


def answer(text: str) -> Generation:
    return Generation(text=text, ids=(), finished=True)


def test_batched_generation_equals_one_prompt_at_a_time(pair: ModelPair) -> None:
    problems = load_suite("instruct", n=3).problems[:9]
    prompts = [tokenize(pair.tokenizer, problem.prompt) for problem in problems]  # type: ignore[arg-type]
    together = generate(pair.specialized, pair.tokenizer, prompts, batch_size=4)  # type: ignore[arg-type]
    for prompt, found in zip(prompts, together, strict=True):
        with torch.no_grad():
            alone = pair.specialized.generate(
                torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)).long(), max_new_tokens=192
            )
        assert pair.tokenizer.decode(alone[0, len(prompt) :], skip_special_tokens=True) == found.text  # type: ignore[union-attr]
        assert found.finished


def test_an_answer_cut_off_is_marked_as_unfinished(pair: ModelPair) -> None:
    prompt = tokenize(pair.tokenizer, "Tell me about the river.")  # type: ignore[arg-type]
    found = generate(pair.base, pair.tokenizer, [prompt], max_new_tokens=3)[0]  # type: ignore[arg-type]
    assert not found.finished
    assert len(found.ids) == 3


def test_patching_everything_jointly_gives_the_specialized_models_answers_exactly(pair: ModelPair) -> None:
    suite = load_suite("instruct", n=2)
    specialized, base = (evaluate(model, pair.tokenizer, suite) for model in (pair.specialized, pair.base))  # type: ignore[arg-type]
    with patched(pair, "ends,blocks") as model:
        joint = evaluate(model, pair.tokenizer, suite)  # type: ignore[arg-type]
    assert [a.generation for a in joint.answers] == [a.generation for a in specialized.answers]
    assert [a.generation for a in base.answers] != [a.generation for a in specialized.answers]
    types = specialized.types
    assert set(types) == {"capitals", "no-comma", "title", "sections", "quotation", "highlights", "plain"}
    assert all(rates.strict.estimate == 1.0 for rates in types.values())


def test_a_plain_answer_may_lack_commas_but_not_show_a_form() -> None:
    plain = Check(type="plain")
    assert plain.passes("A river is long.")
    assert not plain.passes("A RIVER IS LONG.")
    assert not plain.passes('"A river is long."')
    assert not plain.passes("   ")


def test_a_users_ifeval_file_runs_and_types_without_a_checker_are_named_and_counted(tmp_path: Path) -> None:
    rows = [
        {"key": 1, "prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {
            "key": 2,
            "prompt": "b",
            "instruction_id_list": ["detectable_format:number_highlighted_sections", "language:response_language"],
            "kwargs": [{"num_highlights": 1, "section_spliter": None}, {"language": "de"}],
        },
    ]
    file = tmp_path / "input_data.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    problems = load_suite(file).problems
    judged = [judge(problem, answer("*so*, no")) for problem in problems]
    found = Evaluation(suite="mine", answers=tuple(judged))
    assert found.unknown_types == {"language:response_language": 1}
    assert (found.rates.n, found.rates.strict.estimate) == (1, 0.0)
    assert found.types["highlights"].strict.estimate == 1.0
    assert found.types["no-comma"].strict.estimate == 0.0
    found.save(tmp_path / "answers.jsonl")
    records = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [record["strict"] for record in records] == [[False], [True, None]]


def test_the_math_and_code_suites_judge_right_and_wrong_answers() -> None:
    for name, kind in (("math", word_problems), ("code", coding_tasks)):
        suite = load_suite(name, n=6)
        sources = kind("held-out", n=6)
        assert [problem.prompt for problem in suite.problems] == [source.prompt for source in sources]
        solutions = [source.solution for source in sources]
        answers = [f"```python\n{text}\n```" if name == "code" else text for text in solutions]
        right = [judge(problem, answer(text)).strict for problem, text in zip(suite.problems, answers, strict=True)]
        wrong = [judge(problem, answer("#### -12345\ndef f(): pass")).strict for problem in suite.problems]
        assert right == [(True,)] * 6
        assert wrong == [(False,)] * 6


def test_loose_forgives_a_first_line_that_strict_does_not() -> None:
    problem = Problem(id="x", prompt="p", checks=(Check(type="quotation"),))
    judged = judge(problem, answer('Sure:\n"It is long."'))
    assert (judged.strict, judged.loose) == ((False,), (True,))


def test_a_suite_that_cannot_be_used_is_refused_line_by_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "x"}\n{"prompt": "x", "instruction_id_list": ["a"], "kwargs": [{}, {}]}\nnothing\n')
    with pytest.raises(PromptError) as caught:
        load_suite(file)
    for part in ("line 1: no field 'instruction_id_list'", "line 2: 1 instruction ids and 2 kwargs", "line 3: "):
        assert part in str(caught.value)
    with pytest.raises(PromptError, match="cannot read the suite"):
        load_suite("poems")


def test_the_wilson_interval_is_that_of_the_textbook() -> None:
    found = pass_rate(8, 10)
    assert (found.estimate, round(found.low, 4), round(found.high, 4)) == (0.8, 0.4902, 0.9433)
    assert pass_rate(0, 10).low == 0.0
    assert pass_rate(0, 0).estimate != pass_rate(0, 0).estimate


class Letters:
    """A tokenizer that says which tokens it saw; `eos_token_id` ends an answer."""

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return f"{ids}{skip_special_tokens}"


PROMPTS = [(1, 2, 3), (4,), (9, 3, 3, 7, 1, 5, 2, 6, 8, 10), (12, 5), (7, 7, 7)]
N_NEW = 50


def endless(model: PreTrainedModel) -> list[tuple[int, ...]]:
    """What a model says to every prompt, asked alone, if nothing ends an answer."""
    never = Letters(model.config.vocab_size)
    return [generate(model, never, [prompt], max_new_tokens=N_NEW)[0].ids for prompt in PROMPTS]  # type: ignore[arg-type]


def splitting_end(answers: list[tuple[int, ...]]) -> int:
    """A token that soon ends some answers, and not others."""
    soon = [set(own[:N_TOKENS_AT_ONCE]) for own in answers]
    return next(token for token in sorted(set.union(*soon)) if 0 < sum(token in own for own in soon) < len(soon))


@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_answers_are_the_same_when_others_beside_them_end_earlier(shape: str) -> None:
    model = build_model(shape, seed=1)
    whole = endless(model)
    end = splitting_end(whole)
    wanted = [own[: own.index(end)] if end in own else own for own in whole]
    found = generate(model, Letters(end), PROMPTS, max_new_tokens=N_NEW)  # type: ignore[arg-type]
    assert [one.ids for one in found] == wanted
    assert [one.finished for one in found] == [end in own for own in whole]


def test_answers_that_have_ended_are_computed_no_further_and_hooks_are_told() -> None:
    model = build_model("gpt2", seed=1)
    whole = endless(model)
    end = splitting_end(whole)
    stay = [place for place, own in enumerate(whole) if end not in own[:N_TOKENS_AT_ONCE]]
    sizes: list[int] = []
    told: list[list[int]] = []
    hook = model.transformer.register_forward_hook(lambda _, __, output: sizes.append(len(output[0])))
    generate(model, Letters(end), PROMPTS, max_new_tokens=N_NEW, on_batch=lambda rows: told.append(list(rows)))  # type: ignore[arg-type]
    hook.remove()
    assert sizes[: N_TOKENS_AT_ONCE + 1] == [len(PROMPTS)] * N_TOKENS_AT_ONCE + [len(stay)]
    assert len(told[0]) == len(PROMPTS)
    assert sorted(told[1]) == stay


def test_generation_leaves_the_model_as_it_was() -> None:
    model = build_model("gpt2", seed=1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    found = generate(model, Letters(0), [(1, 2, 3), (4,)], max_new_tokens=4)  # type: ignore[arg-type]
    assert len(found) == 2
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
