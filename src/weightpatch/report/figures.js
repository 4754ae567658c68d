/* Draws figures in the colours of the page: what is in view first, the rest when there is time. */
(() => {
  "use strict";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const nodes = [...document.querySelectorAll(".plot")];
  const drawn = new Set();
  let printing = false;
  const config = {
    displaylogo: false,
    showEditInChartStudio: false,
    plotlyServerURL: "",
    modeBarButtons: [["toImage"]],
    toImageButtonOptions: { format: "svg" },
  };
  /* The diverging scale with a dark middle: 0 stays the colour of nothing. */
  const night = [
    [0, "#fddbc7"], [0.15, "#f4a582"], [0.3, "#c94741"], [0.42, "#6b2230"], [0.5, "#22272e"],
    [0.58, "#1d4468"], [0.7, "#2f79b5"], [0.85, "#92c5de"], [1, "#d1e5f0"],
  ];

  function themed(figure, isDark) {
    const layout = figure.layout;
    if (!isDark) return figure;
    const base = layout.template.layout;
    base.font.color = "#e3e7ec";
    for (const axis of [base.xaxis, base.yaxis]) {
      Object.assign(axis, { gridcolor: "#2d333b", linecolor: "#4a525c", zerolinecolor: "#7d8792" });
    }
    if (layout.coloraxis) layout.coloraxis.colorscale = night;
    return figure;
  }

  function draw(node, isDark, width) {
    const figure = themed(JSON.parse(document.getElementById(node.dataset.figure).textContent), isDark);
    if (width) Object.assign(figure.layout, { width, autosize: false });
    drawn.add(node);
    return Plotly.react(node, figure.data, figure.layout, config);
  }

  const watcher = new IntersectionObserver(
    (entries) => entries.forEach((entry) => {
      if (entry.isIntersecting && !drawn.has(entry.target)) draw(entry.target, dark.matches);
    }),
    { rootMargin: "600px" },
  );
  const sizes = new ResizeObserver((entries) => entries.forEach((entry) => {
    const { target, contentRect } = entry;
    if (drawn.has(target) && !printing && contentRect.width > 0) Plotly.Plots.resize(target);
  }));
  nodes.forEach((node) => { watcher.observe(node); sizes.observe(node); });
  const later = globalThis.requestIdleCallback ?? ((call) => setTimeout(call, 200));
  const drawNext = () => {
    const node = nodes.find((candidate) => !drawn.has(candidate) && candidate.offsetWidth > 0);
    if (!node) return;
    draw(node, dark.matches);
    later(drawNext);
  };
  later(drawNext);
  dark.addEventListener("change", () => drawn.forEach((node) => draw(node, dark.matches)));

  /* A link to a task opens it; on paper everything is open. */
  const open = () => {
    const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", open);
  document.querySelectorAll('a[href^="#"]').forEach((link) => link.addEventListener("click", () => setTimeout(open)));
  open();
  let closed = [];
  addEventListener("beforeprint", () => {
    printing = true;
    closed = [...document.querySelectorAll("details:not([open])")];
    closed.forEach((details) => { details.open = true; });
    nodes.forEach((node) => draw(node, false, node.closest(".pair") ? 330 : 690));
  });
  addEventListener("afterprint", () => {
    printing = false;
    closed.forEach((details) => { details.open = false; });
    nodes.forEach((node) => { Plotly.purge(node); drawn.delete(node); watcher.unobserve(node); watcher.observe(node); });
  });
})();
