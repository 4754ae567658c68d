"""A pair: the base and the specialized checkpoint of one architecture, checked before anything is measured on them."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from weightpatch.architecture import Architecture, embedding_weight, family_of, skeleton
from weightpatch.checkpoint import (
    Checkpoint,
    DeviceMap,
    find,
    read_adapter_config,
    read_config,
    read_dtype,
    read_tokenizer,
    same_tokenizer_files,
    shapes,
    weight_files,
)
from weightpatch.derivation import Rows, adopt_row
from weightpatch.errors import CheckpointError, PairError, PromptError
from weightpatch.files import fingerprint
from weightpatch.prompts import ContrastPrompts
from weightpatch.proof import prove_row
from weightpatch.sources import Source, open_beside
from weightpatch.streaming import is_streamed, keep, materialized, pieces, streamed, weight

_NOT_COMPUTATION = re.compile(
    r"_?(model_)?name_or_path|_?attn_implementation.*|transformers_version|dtype|torch_dtype|architectures|use_cache"
    r"|(bos|eos|pad|unk|sep)_token_id|.*dropout|.*pdrop|initializer_.*|pretraining_tp|output_.*|return_dict|id2label"
    r"|label2id|problem_type|chunk_size_feed_forward|max_position_embeddings|n_positions|n_ctx|summary_.*"
    r"|task_specific_params|finetuning_task|tokenizer_class|quantization_config|gradient_checkpointing|is_decoder"
    r"|is_encoder_decoder"
)
"""Config fields that do not change what given weights compute on a prompt."""

_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    '<<Title>>\n\n*one*, "two"; SECTION 3',
    "  def f(x):\n\treturn x",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelPair:
    """Base and specialized model of one architecture, in one dtype.

    Built from modules already in memory, or by `from_pretrained`. The modules are never changed beyond a call. A
    specialized model that is streamed and given as a base is loaded whole, for good.

    Attributes:
        base: The model that receives weights.
        specialized: The model that gives them; from `from_pretrained`, one whose weights are read when needed: it runs
            like any other, but read its weights by `specialized_weight`, or all of them within `materialized`.
        tokenizer: For prompts that are text; None when all prompts are token ids.
        base_name: Where the base came from, for the record.
        specialized_name: Where the specialized model came from.
        fingerprints: Of the files of `base` and `specialized` (`files.fingerprint`); empty for modules in memory.

    Raises:
        PairError: they are no pair, every difference listed; or they hold the same weights.
        CheckpointError: weights that are NaN or infinite.
        ArchitectureError: no row of the table fits, or the row does not hold for this model.
    """

    base: PreTrainedModel
    specialized: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None = None
    base_name: str = "base"
    specialized_name: str = "specialized"
    fingerprints: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.base, PreTrainedModel):
            keep(self.base)
        for side, model in (("base", self.base), ("specialized", self.specialized)):
            _check_model(side, model)
        differences = _config_differences(self.base.config, self.specialized.config)
        differences += _shape_differences(_shapes(self.base), _shapes(self.specialized))
        dtypes = [sorted({str(p.dtype) for p in model.parameters()}) for model in (self.base, self.specialized)]
        if dtypes[0] != dtypes[1] or len(dtypes[0]) > 1:
            differences.append(f"dtype: {', '.join(dtypes[0])} in the base, {', '.join(dtypes[1])} in the specialized")
        if differences:
            raise _no_pair(self.base_name, self.specialized_name, differences)
        _check_weights(self)
        prove_row(self.base)

    @classmethod
    def from_pretrained(
        cls,
        base: str | Path,
        specialized: str | Path,
        *,
        revision: str | None = None,
        specialized_revision: str | None = None,
        dtype: str | torch.dtype = "float32",
        architecture: Rows = "table",
        device_map: DeviceMap | None = None,
        allow_pickle: bool = False,
        any_adapter_base: bool = False,
        prompts: ContrastPrompts | None = None,
    ) -> ModelPair:
        """Check that two checkpoints are a pair, then load the base, and the specialized one layer by layer on demand.

        Args:
            base: Hub id, folder or GGUF file.
            specialized: The same, or the folder of a PEFT adapter, which is applied to the base.
            revision: Of the base on the hub.
            specialized_revision: Of the specialized checkpoint on the hub.
            dtype: Of all weights of both; a name or a torch dtype.
            architecture: `"auto"` derives a row, and proves it, where the table knows none for the model's family.
            device_map: As in transformers.
            allow_pickle: Read pickled weights too.
            any_adapter_base: Apply an adapter although it names another base than the one given.
            prompts: Prompts to be used; both tokenizers must give them the same tokens.

        Raises:
            PairError: no pair; one sentence for each difference, before any weight is read.
            CheckpointError: a checkpoint that cannot be read.
        """
        checked = check_pair(
            base,
            specialized,
            revision=revision,
            specialized_revision=specialized_revision,
            architecture=architecture,
            allow_pickle=allow_pickle,
            any_adapter_base=any_adapter_base,
            prompts=prompts,
        )
        model, source = open_beside(
            checked.specialized,
            base=checked.base,
            dtype=read_dtype(dtype),
            device_map=device_map,
            allow_pickle=allow_pickle,
        )
        if differences := _source_differences(model, source):
            raise _no_pair(str(base), str(specialized), differences)
        return cls(
            base=model,
            specialized=streamed(model, source),
            tokenizer=checked.tokenizer,
            base_name=str(base),
            specialized_name=str(specialized),
            fingerprints={
                "base": fingerprint(checked.base.path),
                "specialized": fingerprint(checked.specialized.path),
            },
        )

    @cached_property
    def architecture(self) -> Architecture:
        """Where everything lives in both models."""
        return Architecture.of(self.base)

    def specialized_weight(self, name: str) -> Tensor:
        """One parameter of the specialized checkpoint, by its full name; the engines read weights no other way.

        On the device of the base's parameter of that name. Of a streamed model, those of the layer asked for last are
        kept in memory. Not to be written.
        """
        return weight(self.specialized, name)

    @contextmanager
    def materialized(self) -> Iterator[PreTrainedModel]:
        """The specialized model with all its weights in memory as long as the block lasts: for generation."""
        with materialized(self.specialized):
            yield self.specialized

    @contextmanager
    def exchanged(self) -> Iterator[ModelPair]:
        """The pair with the roles exchanged, for as long as the block lasts: the specialized model receives.

        All of its weights are in memory as long.
        """
        with self.materialized():
            yield self.with_models(self.specialized, self.base)

    def with_models(self, base: PreTrainedModel, specialized: PreTrainedModel) -> ModelPair:
        """A pair of other models of this architecture, which are not checked again."""
        other = copy.copy(self)
        object.__setattr__(other, "base", base)
        object.__setattr__(other, "specialized", specialized)
        return other

    def digests(self) -> dict[str, str]:
        """SHA-256 over names and bytes of all weights, for `base` and `specialized`."""
        return {"base": _digest(self.base), "specialized": _digest(self.specialized)}


@dataclass(frozen=True, kw_only=True)
class CheckedPair:
    """Two checkpoints that may be loaded as a pair.

    Attributes:
        base: The base.
        specialized: The specialized one.
        tokenizer: The specialized side's where it brings a chat template (a pretrained base often has none), else the
            base's; None when neither has one.
    """

    base: Checkpoint
    specialized: Checkpoint
    tokenizer: PreTrainedTokenizerBase | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Known:
    """What can be known of a checkpoint without its weights; each thing is read once, when it is first asked for.

    Attributes:
        checkpoint: The checkpoint.
    """

    checkpoint: Checkpoint

    @cached_property
    def config(self) -> PreTrainedConfig:
        """Its configuration; of an adapter, there is none."""
        return read_config(self.checkpoint)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Its tokenizer, if it brings one."""
        return read_tokenizer(self.checkpoint)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter -> shape of the model that its configuration describes."""
        return _shapes(skeleton(self.config))


def check_pair(
    base: str | Path | Known,
    specialized: str | Path,
    *,
    revision: str | None = None,
    specialized_revision: str | None = None,
    architecture: Rows = "table",
    allow_pickle: bool = False,
    any_adapter_base: bool = False,
    prompts: ContrastPrompts | None = None,
) -> CheckedPair:
    """Everything that can be checked about a pair without reading a weight. Arguments as in `from_pretrained`.

    Who checks several against one base gives what is known of it, so that it is read once.

    Raises:
        PairError: every difference, one sentence each.
        CheckpointError: a checkpoint that is missing, truncated or pickled.
    """
    known = base if isinstance(base, Known) else Known(checkpoint=find(base, revision=revision))
    left, right = known.checkpoint, find(specialized, revision=specialized_revision)
    if left.kind == "adapter":
        raise CheckpointError(
            f"{left.reference} is a PEFT adapter. Give the full model as the base, the adapter as specialized."
        )
    for checkpoint in (left, right):
        weight_files(checkpoint, allow_pickle=allow_pickle)
    config = known.config
    if architecture == "auto":
        adopt_row(config)
    family_of(config)
    if right.kind == "adapter":
        names = {left.reference, str(left.path), str(getattr(config, "_name_or_path", ""))}
        differences = [] if any_adapter_base else _adapter_base_differences(right, names)
        differences += _adapter_shape_differences(right, known, allow_pickle=allow_pickle)
    else:
        other = Known(checkpoint=right)
        differences = _config_differences(config, other.config)
        if config.to_json_string() != other.config.to_json_string():  # the same one describes the same shapes
            differences += _shape_differences(known.shapes, other.shapes)
        if left.kind == right.kind:
            stored = shapes(left, allow_pickle=allow_pickle), shapes(right, allow_pickle=allow_pickle)
            common = stored[0].keys() & stored[1].keys()
            in_both = [{name: side[name] for name in side if name in common} for side in stored]
            differences += [line for line in _shape_differences(*in_both) if line not in differences]
    ours = known.tokenizer
    theirs = ours if same_tokenizer_files(left, right) else read_tokenizer(right)
    if theirs is not ours:
        differences += _tokenizer_differences(ours, theirs, prompts)
    if differences:
        raise _no_pair(left.reference, str(specialized), differences)
    tokenizer = theirs if theirs is not None and (theirs.chat_template or ours is None) else ours
    return CheckedPair(base=left, specialized=right, tokenizer=tokenizer)


def _check_model(side: str, model: object) -> None:
    """Raise unless it is a model of a known family whose weights are all in memory, or streamed."""
    if not isinstance(model, PreTrainedModel):
        raise PairError(f"the {side} is a {type(model).__name__}; give a transformers model with its head.")
    family_of(model.config)
    if is_streamed(model):
        return
    if elsewhere := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise CheckpointError(
            f"{len(elsewhere)} parameters of the {side} are not in memory ({elsewhere[0]}, ...): it was offloaded. "
            "Use a smaller dtype or another device_map."
        )


def _no_pair(base: str, specialized: str, differences: list[str]) -> PairError:
    return PairError(
        f"{base} and {specialized} are no pair: weights can only be patched between two checkpoints of one "
        "architecture and vocabulary. What differs:",
        differences,
    )


def _config_differences(base: PreTrainedConfig, specialized: PreTrainedConfig) -> list[str]:
    if base.model_type != specialized.model_type:
        return [f"architecture: {base.model_type} in the base, {specialized.model_type} in the specialized"]
    left, right = base.to_dict(), specialized.to_dict()
    scaled = any((side.get("rope_parameters") or {}).get("rope_type", "default") != "default" for side in (left, right))
    return [
        f"{name}: {left.get(name)!r} in the base, {right.get(name)!r} in the specialized"
        for name in sorted(left.keys() | right.keys())
        if not _same_value(left.get(name), right.get(name))
        and (not _NOT_COMPUTATION.fullmatch(name) or (scaled and name == "max_position_embeddings"))
    ]


def _same_value(one: object, other: object) -> bool:
    """Equal, or numbers equal to float32: GGUF stores its numbers in that precision."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-6)
    return one == other


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _shape_differences(left: dict[str, tuple[int, ...]], right: dict[str, tuple[int, ...]]) -> list[str]:
    lines = [
        f"{name}: shape {list(left[name])} in the base, {list(right[name])} in the specialized"
        for name in left
        if name in right and left[name] != right[name]
    ]
    for side, absent in (("specialized", left.keys() - right.keys()), ("base", right.keys() - left.keys())):
        if absent:
            names = sorted(absent)
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            lines.append(f"parameters missing in the {side}: {', '.join(names[:4])}{more}")
    return lines if len(lines) <= 12 else [*lines[:12], f"{len(lines) - 12} more shapes"]


def _source_differences(base: PreTrainedModel, source: Source) -> list[str]:
    """What differs only now that the specialized weights were looked at."""
    differences = _config_differences(base.config, source.config) if source.config else []
    return differences + _shape_differences(_shapes(base), dict(source.shapes))


def _adapter_base_differences(adapter: Checkpoint, known_as: set[str]) -> list[str]:
    trained_on = str(read_adapter_config(adapter).get("base_model_name_or_path") or "")
    if not trained_on or any(_same_name(trained_on, name) for name in known_as):
        return []
    return [
        f"the adapter was trained on {trained_on!r}, not on {max(known_as, key=len)!r}. If these are the same "
        "weights under two names, pass --any-adapter-base (any_adapter_base=True)"
    ]


def _adapter_shape_differences(adapter: Checkpoint, base: Known, *, allow_pickle: bool) -> list[str]:
    differences = []
    expected = base.shapes
    inputs = 0 if family_of(base.config).transposed else 1
    for name, shape in shapes(adapter, allow_pickle=allow_pickle).items():
        factor = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])(?:\.\w+)?\.weight", name)
        if factor is None:
            continue
        weight = expected.get(f"{factor[1]}.weight")
        if weight is None:
            differences.append(f"the adapter changes {factor[1]}, which the base does not have")
        elif (factor[2] == "A" and shape[1] != weight[inputs]) or (factor[2] == "B" and shape[0] != weight[1 - inputs]):
            differences.append(f"{name}: shape {list(shape)} does not fit the base's {factor[1]}, {list(weight)}")
    return differences if len(differences) <= 12 else [*differences[:12], f"{len(differences) - 12} more tensors"]


def _same_name(one: str, other: str) -> bool:
    """Whether two names can mean one model: same last part but for case, punctuation and a GGUF file's ending."""
    last = [name.rstrip("/").rsplit("/", 1)[-1].lower() for name in (one, other)]
    plain = [re.sub(r"[^a-z0-9]", "", re.sub(r"([-.]i?q\d\w*|[-.]b?f(16|32))?\.gguf$", "", name)) for name in last]
    return bool(plain[0]) and plain[0] == plain[1]


def _tokenizer_differences(
    base: PreTrainedTokenizerBase | None, specialized: PreTrainedTokenizerBase | None, prompts: ContrastPrompts | None
) -> list[str]:
    if base is None or specialized is None:
        return []
    left, right = base.get_vocab(), specialized.get_vocab()
    changed = sorted(token for token in left.keys() | right.keys() if left.get(token) != right.get(token))
    if changed:
        named = ", ".join(repr(token) for token in changed[:4])
        return [
            f"vocabulary: {len(left)} tokens in the base, {len(right)} in the specialized; "
            f"{len(changed)} of them differ, first {named}"
        ]
    texts = [*_PROBES, *(row.text for row in prompts or () if row.prompt)]
    split_apart = [text for text in texts if base.encode(text) != specialized.encode(text)]
    if split_apart:
        return [f"tokenization: {len(split_apart)} of {len(texts)} texts get other tokens, first {split_apart[0]!r}"]
    return []


def _check_weights(pair: ModelPair) -> None:
    """Raise for values that are no numbers, or when nothing differs; in one pass, piece by piece."""
    broken, same = [], True
    for name, parameter in pair.base.named_parameters():
        counts = {"base": 0, "specialized": 0}
        for ours, theirs in zip(pieces(pair.base, name), pieces(pair.specialized, name), strict=True):
            for side, piece in (("base", ours), ("specialized", theirs)):
                counts[side] += piece.numel() - int(torch.isfinite(piece).sum())
            same = same and torch.equal(ours, theirs.to(ours.device))
        broken += [f"{name} of the {side}: {n} of {parameter.numel()} values" for side, n in counts.items() if n]
    if broken:
        listed = "\n".join(f"  - {line}" for line in broken[:12])
        raise CheckpointError(f"weights that are NaN or infinite:\n{listed}\nGet an intact checkpoint.")
    if same:
        raise PairError(
            f"{pair.base_name} and {pair.specialized_name} hold the same weights, so there is nothing to localize. "
            "Was one of them named twice?"
        )


def _digest(model: PreTrainedModel) -> str:
    digest = hashlib.sha256(json.dumps({"model_type": model.config.model_type}).encode())
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(str(parameter.dtype).encode())
        for piece in pieces(model, name):
            digest.update(piece.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_prompts(
    pair: ModelPair, prompts: ContrastPrompts, *, positions: Sequence[int] = (), both_sides: bool = True
) -> None:
    """Raise unless both models can read every prompt, with and without its instruction.

    Args:
        pair: The two models.
        prompts: The prompts.
        positions: Readout positions that every prompt must have.
        both_sides: Whether the queries without their instruction are read at these positions too.

    Raises:
        PromptError: a token id outside the vocabulary, a prompt longer than a learned position table, or too short
            for a readout position; names the first such prompt.
    """
    limit = int(embedding_weight(pair.base).shape[0])
    longest = pair.architecture.n_positions
    tokenized = prompts.tokenize(pair.tokenizer)
    for name, *sides in zip(tokenized.ids, tokenized.with_instruction, tokenized.without_instruction, strict=True):
        for place, ids in enumerate(sides):
            if outside := [token for token in ids if not 0 <= token < limit]:
                raise PromptError(
                    f"prompt {name}: token id {outside[0]} is outside the vocabulary of {limit} tokens. Was it made "
                    "with another tokenizer?"
                )
            if longest is not None and len(ids) > longest:
                raise PromptError(f"prompt {name} has {len(ids)} tokens; this model reads {longest}. Shorten it.")
            is_read = place == 0 or both_sides
            if is_read and any(not -len(ids) <= position < len(ids) for position in positions):
                raise PromptError(
                    f"prompt {name} has {len(ids)} tokens, too few for readout positions {list(positions)}. Drop it, "
                    "or read at other positions."
                )
