"use strict";
// Draws the figures and links them: one step, one layer and one expert are chosen for the whole page.
// Text of the data reaches the page through textContent only, or escaped by the program that wrote the figures.

(async () => {
  const byId = (id) => document.getElementById(id);

  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(byId(id).textContent), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }

  const library = document.createElement("script");
  library.textContent = await unpacked("plotly");
  document.head.append(library);

  const page = JSON.parse(byId("data").textContent);
  const router = page.router;
  const state = { frame: 0, layer: 0, expert: 0 };
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d"] };
  const exists = (name) => name in page.figures && byId(name);
  const isCurve = (name) => name.startsWith("curve-");
  const shown = Object.keys(page.figures).filter((name) => byId(name));

  // ---------------------------------------------------------------------------------------------------- light, dark
  let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = theme;

  function paint(name) {
    document.documentElement.dataset.theme = name;
    return Promise.all(shown.map((id) => Plotly.relayout(byId(id), { template: page.themes[name] })));
  }
  byId("theme").addEventListener("click", () => paint((theme = theme === "dark" ? "light" : "dark")));
  addEventListener("beforeprint", () => paint("light"));
  addEventListener("afterprint", () => paint(theme));

  // ------------------------------------------------------------------------------------------------------ figures
  for (const name of shown) {
    const { data, layout } = page.figures[name];
    const image = { toImageButtonOptions: { filename: name, scale: 2 } };
    await Plotly.newPlot(byId(name), data, { ...layout, template: page.themes[theme] }, { ...config, ...image });
  }

  const ownShapes = (name) => page.figures[name].layout.shapes ?? [];
  const upright = (step, color, dash) => ({
    type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line: { color, width: 1, dash },
  });

  function markStep(name, step) {
    const alarms = page.alarms.map((at) => upright(at, "#d55e00", "dot"));
    Plotly.relayout(byId(name), { shapes: [...ownShapes(name), ...alarms, upright(step, "#888", "solid")] });
  }

  // The common cursor: what is under the mouse in one curve is shown in all.
  const curves = shown.filter(isCurve);
  let hovering = false;
  for (const name of curves) {
    const others = curves.filter((other) => other !== name);
    byId(name).on("plotly_hover", (event) => {
      if (hovering) return;
      hovering = true;
      for (const other of others) Plotly.Fx.hover(byId(other), { xval: event.points[0].x }, "xy");
      hovering = false;
    });
    byId(name).on("plotly_unhover", () => others.forEach((other) => Plotly.Fx.unhover(byId(other))));
    byId(name).on("plotly_click", (event) => router && chooseStep(event.points[0].x));
  }

  function nearest(numbers, wanted) {
    let best = 0;
    for (let index = 1; index < numbers.length; index++)
      if (Math.abs(numbers[index] - wanted) < Math.abs(numbers[best] - wanted)) best = index;
    return best;
  }

  // ------------------------------------------------------------------------------------------------------- router
  const log2 = (load) => Math.log2(Math.max(load, 2 ** (-2 * router.limit)));
  const column = (values, index) => values.map((row) => row[index]);

  function heatmap(name, loads, x, y) {
    const dead = [];
    loads.forEach((row, i) => row.forEach((load, j) => load === 0 && dead.push([x[j], y[i]])));
    const marks = {
      type: "scatter", mode: "markers", hoverinfo: "skip", showlegend: false, x: column(dead, 0), y: column(dead, 1),
      marker: { symbol: "x-thin", size: 7, line: { width: 1.5, color: "#fff" } },
    };
    const [map] = page.figures[name].data;
    const filled = { ...map, z: loads.map((row) => row.map(log2)), customdata: loads, x, y };
    Plotly.react(byId(name), [filled, marks], byId(name).layout, config);
  }

  const numbers = (count) => [...Array(count).keys()];
  const layers = router ? router.values[0].length : 0;
  const experts = router ? router.values[0][0].length : 0;

  const box = (x, y) => ({
    type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: "#e69f00", width: 2 },
  });

  function drawFrame() {
    const step = router.steps[state.frame];
    byId("step").value = state.frame;
    byId("step-name").textContent = `step ${step} of ${router.steps.at(-1)}`;
    heatmap("load", router.values[state.frame], numbers(experts), numbers(layers));
    for (const name of [...curves, "expert-load"]) markStep(name, step);
    markHistory();
  }

  function markHistory() {
    const { frame, layer, expert } = state;
    Plotly.relayout(byId("load"), { shapes: [box(expert, layer)] });
    Plotly.relayout(byId("history"), { shapes: [upright(router.steps[frame], "#e69f00", "solid")] });
  }

  function drawExpert() {
    const { layer, expert } = state;
    byId("layer").value = layer;
    byId("expert").value = expert;
    byId("expert-name").textContent = `${expert} of layer ${layer}`;
    const loads = router.values.map((frame) => frame[layer]);
    heatmap("history", numbers(experts).map((e) => column(loads, e)), router.steps, numbers(experts));
    Plotly.relayout(byId("history"), { "title.text": `Load over training, layer ${layer}` });
    const lines = [{ name: "load", x: router.steps, y: column(loads, expert), type: "scatter", showlegend: false }];
    Plotly.react(byId("expert-load"), lines, byId("expert-load").layout, config);
    markHistory();
  }

  function chooseFrame(frame) {
    state.frame = Math.min(Math.max(frame, 0), router.steps.length - 1);
    drawFrame();
  }

  const chooseStep = (step) => chooseFrame(nearest(router.steps, step));

  function chooseExpert(layer, expert) {
    [state.layer, state.expert] = [layer, expert];
    drawExpert();
  }

  if (router) {
    const options = (id, count) => byId(id).append(...numbers(count).map((number) => new Option(number, number)));
    options("layer", layers);
    options("expert", experts);
    byId("step").max = router.steps.length - 1;
    byId("step").addEventListener("input", (event) => chooseFrame(Number(event.target.value)));
    byId("layer").addEventListener("change", (event) => chooseExpert(Number(event.target.value), state.expert));
    byId("expert").addEventListener("change", (event) => chooseExpert(state.layer, Number(event.target.value)));
    byId("load").on("plotly_click", ({ points: [point] }) => chooseExpert(point.y, point.x));
    byId("history").on("plotly_click", ({ points: [point] }) => {
      chooseStep(point.x);
      chooseExpert(state.layer, point.y);
    });
    document.querySelectorAll("[data-step]").forEach((button) =>
      button.addEventListener("click", () => chooseStep(Number(button.dataset.step))));

    let timer = null;
    const pause = () => {
      clearInterval(timer);
      timer = null;
      byId("play").textContent = "▶";
    };
    byId("play").addEventListener("click", () => {
      if (timer !== null) return pause();
      if (state.frame === router.steps.length - 1) chooseFrame(0);
      byId("play").textContent = "⏸";
      timer = setInterval(() => {
        chooseFrame(state.frame + 1);
        if (state.frame === router.steps.length - 1) pause();
      }, Math.max(60, Math.min(500, 8000 / router.steps.length)));
    });
    drawExpert();
    chooseFrame(router.steps.length - 1);
  }
  document.body.dataset.ready = "yes";
})().catch((error) => {
  const line = document.getElementById("failure");
  line.textContent = `The figures cannot be drawn: ${error}`;
  line.hidden = false;
  throw error;
});
