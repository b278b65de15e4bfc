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
  const { router, heldout } = page;
  const state = { frame: 0, layer: 0, expert: 0, token: 0, domain: "", from: 0, to: 0 };
  const shown = Object.keys(page.figures).filter(byId);
  const has = (name) => shown.includes(name);
  let choose = () => {}; // Changes the state; a run without a router has nothing to choose.

  // ---------------------------------------------------------------------------------------------------- small helpers
  const numbers = (count) => [...Array(count).keys()];
  const column = (rows, index) => rows.map((row) => row[index]);
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const setText = (selector, text) => document.querySelectorAll(selector).forEach((node) => (node.textContent = text));

  function nearest(values, wanted) {
    let best = 0;
    for (let index = 1; index < values.length; index++)
      if (Math.abs(values[index] - wanted) < Math.abs(values[best] - wanted)) best = index;
    return best;
  }

  // The last of the ascending steps that is not after `step`, or the first.
  const lastBefore = (steps, step) => Math.max(0, steps.findLastIndex((each) => each <= step));

  // An array that the writer has packed into base64. `at(i, j, ...)` is an element.
  function unpack(array) {
    if (!array) return null;
    const bytes = Uint8Array.from(atob(array.data), (character) => character.charCodeAt(0));
    const codes = array.bits === 8 ? bytes : new Uint16Array(bytes.buffer);
    const strides = array.shape.map((_, axis) => array.shape.slice(axis + 1).reduce((a, b) => a * b, 1));
    const at = (...index) => {
      const code = codes[sum(index.map((position, axis) => position * strides[axis]))];
      return code === array.missing ? NaN : code * array.scale;
    };
    return { ...array, at };
  }

  // ------------------------------------------------------------------------------------------------------ figures
  let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = theme;
  const config = (name) => ({
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d"],
    toImageButtonOptions: { filename: name, scale: 2 },
  });

  for (const name of shown) {
    const { data, layout } = page.figures[name];
    await Plotly.newPlot(byId(name), data, { ...layout, template: page.themes[theme] }, config(name));
  }

  function paint(name) {
    document.documentElement.dataset.theme = name;
    shown.forEach((id) => Plotly.relayout(byId(id), { template: page.themes[name] }));
    choose({ frame: state.frame, layer: state.layer }); // The crosses have the colour of the page.
  }
  byId("theme").addEventListener("click", () => paint((theme = theme === "dark" ? "light" : "dark")));
  addEventListener("beforeprint", () => paint("light"));
  addEventListener("afterprint", () => paint(theme));

  // Put values into the traces that the writer has prepared; `title` and `layout` replace parts of the layout.
  function fill(name, traces, { title, ...layout } = {}) {
    if (!has(name)) return;
    const figure = byId(name);
    const prepared = page.figures[name].data;
    const data = traces.map((trace, index) => ({ ...(prepared[index] ?? {}), ...trace }));
    const titled = title === undefined ? {} : { title: { ...figure.layout.title, text: title } };
    Plotly.react(figure, data, { ...figure.layout, ...titled, ...layout }, config(name));
  }

  function fillMap(name, values, x, y, title, more = {}) {
    fill(name, [{ z: values, customdata: values, x, y, ...more }], { title });
  }

  // ------------------------------------------------------------------------------------- curves, and the common cursor
  const overSteps = shown.filter((name) => page.figures[name].layout.xaxis.title?.text === "optimizer step" && name !== "history");
  const upright = (step, color, dash) => ({
    type: "line", x0: step, x1: step, yref: "paper", y0: 0, y1: 1, line: { color, width: 1, dash },
  });

  function markStep(step) {
    const alarms = page.alarms.map((at) => upright(at, "#d55e00", "dot"));
    for (const name of overSteps) {
      const own = page.figures[name].layout.shapes ?? [];
      Plotly.relayout(byId(name), { shapes: [...own, ...alarms, upright(step, "#888", "solid")] });
    }
  }

  let hovering = false;
  for (const name of overSteps) {
    const others = overSteps.filter((other) => other !== name);
    byId(name).on("plotly_hover", (event) => {
      if (hovering) return;
      hovering = true;
      for (const other of others) Plotly.Fx.hover(byId(other), { xval: event.points[0].x }, "xy");
      hovering = false;
    });
    byId(name).on("plotly_unhover", () => others.forEach((other) => Plotly.Fx.unhover(byId(other))));
    byId(name).on("plotly_click", (event) => choose({ frame: router ? nearest(router.steps, event.points[0].x) : 0 }));
  }

  // ------------------------------------------------------------------------------------------- the table of a sweep
  function linkTable(table) {
    const [body] = table.tBodies;
    const headers = [...table.querySelectorAll("th")];
    const valueOf = (row, index) => {
      const { textContent, dataset } = row.cells[index];
      return "sort" in dataset ? Number(dataset.sort) : textContent;
    };
    // Numbers come before text, in both directions.
    const compare = (a, b) => (typeof a === typeof b ? (a < b ? -1 : Number(a > b)) : null);
    headers.forEach((header, index) => header.addEventListener("click", () => {
      const up = header.ariaSort !== "ascending";
      headers.forEach((other) => (other.ariaSort = null));
      header.ariaSort = up ? "ascending" : "descending";
      body.append(...[...body.rows].sort((left, right) => {
        const [a, b] = [valueOf(left, index), valueOf(right, index)];
        return (up ? 1 : -1) * compare(a, b) || (typeof a === "number" ? -1 : 1) * (compare(a, b) === null);
      }));
    }));
    byId("filter").addEventListener("input", ({ target }) => {
      const wanted = target.value.toLowerCase();
      for (const row of body.rows) row.hidden = !row.textContent.toLowerCase().includes(wanted);
    });
  }

  if (byId("jobs")) linkTable(byId("jobs"));
  if (router) drawRouter();
  else document.body.dataset.ready = "yes";

  // ------------------------------------------------------------------------------------------------------- router
  function drawRouter() {
    const last = router.values.at(-1);
    const [layers, experts] = [last.length, last[0].length];
    const [layerNumbers, expertNumbers] = [numbers(layers), numbers(experts)];
    const byDomain = unpack(heldout?.by_domain);
    const byWord = unpack(heldout?.by_word);
    const pairs = unpack(heldout?.pairs);
    const text = heldout && {
      ...heldout.text,
      experts: unpack(heldout.text.experts),
      weights: unpack(heldout.text.weights),
      margins: unpack(heldout.text.margins),
    };
    const topK = text?.experts.shape[3] ?? 0;
    const step = () => router.steps[state.frame];
    // The page has frames of the probe before the first step with loads. Their loads are null.
    const first = router.values.findIndex((loads) => loads !== null);
    const [loadSteps, loads] = [router.steps.slice(first), router.values.slice(first)];
    const unloaded = layerNumbers.map(() => Array(experts).fill(null));
    const lackOf = (...frames) => frames.filter((frame) => router.values[frame] === null).map((frame) => router.steps[frame]);
    const noteOf = (steps) => steps.length === 0 ? [] : [{
      text: `No loads at step ${steps.join(" and ")}: they are counted from step ${loadSteps[0]} on.`,
      xref: "paper", yref: "paper", x: 0.5, y: 0.5, showarrow: false, font: { size: 12 },
    }];

    const logOf = (value, limit) => Math.min(limit, Math.max(-limit, Math.log2(Math.max(value, 1e-9))));
    const box = (x, y) => ({
      type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, line: { color: "#e69f00", width: 2 },
    });

    function fillLoads(name, loads, x, y, layout) {
      const dead = [];
      loads.forEach((row, i) => row.forEach((load, j) => load === 0 && dead.push([x[j], y[i]])));
      const crosses = {
        type: "scatter", mode: "markers", hoverinfo: "skip", showlegend: false, x: column(dead, 0), y: column(dead, 1),
        marker: { symbol: "x-thin", size: 7, line: { width: 1.5, color: document.documentElement.dataset.theme === "dark" ? "#14171b" : "#fff" } },
      };
      const z = loads.map((row) => row.map((load) => (load === null ? null : logOf(load, router.limit))));
      fill(name, [{ z, customdata: loads, x, y }, crosses], layout);
    }

    // A map of numbers whose balance is 1: colours range from a quarter to four times.
    function fillRatios(name, values, x, y, title) {
      const z = values.map((row) => row.map((value) => (Number.isNaN(value) ? null : logOf(value, 2))));
      const colorbar = { tickvals: [-2, -1, 0, 1, 2], ticktext: ["≤0.25", "0.5", "1", "2", "≥4"] };
      fill(name, [{ z, customdata: values, x, y, zmin: -2, zmax: 2, colorbar }], { title });
    }

    // -------------------------------------------------------------------------------------------- parts of the page
    function drawFrame() {
      byId("step").value = state.frame;
      byId("step-name").textContent = `step ${step()} of ${router.steps.at(-1)}`;
      fillLoads("load", router.values[state.frame] ?? unloaded, expertNumbers, layerNumbers, { annotations: noteOf(lackOf(state.frame)) });
      markStep(step());
    }

    function drawLayer() {
      byId("layer").value = state.layer;
      setText(".layer-name", state.layer);
      const rows = expertNumbers.map((expert) => column(column(loads, state.layer), expert));
      fillLoads("history", rows, loadSteps, expertNumbers, { title: `Load over training, layer ${state.layer}` });
    }

    function drawChosen() {
      byId("expert").value = state.expert;
      setText(".expert-name", `${state.expert} of layer ${state.layer}`);
      Plotly.relayout(byId("load"), { shapes: [box(state.expert, state.layer)] });
      Plotly.relayout(byId("history"), { shapes: [upright(step(), "#e69f00", "solid")] });
    }

    function drawExpert() {
      const { layer, expert } = state;
      const line = (values, more) => ({ type: "scatter", mode: "lines", showlegend: false, ...values, ...more });
      const load = loads.map((frame) => frame[layer][expert]);
      fill("expert-load", [line({ name: "load", x: loadSteps, y: load })]);
      const axes = { "gradient norm": "y", "weight norm": "y2" };
      fill("expert-norms", Object.entries(router.norms).map(([name, { steps, values }]) =>
        line({ name, x: steps, y: values.map((frame) => frame[layer][expert]) }, { yaxis: axes[name] })));
    }

    function drawStatistics() {
      const { layer, expert } = state;
      const at = (array) => lastBefore(array.steps, step());
      const any = byDomain ?? byWord ?? pairs;
      if (any) setText("#router .probe-step, #specialisation .probe-step", `Probe of step ${any.steps[at(any)]}.`);
      if (byDomain) {
        const index = at(byDomain);
        const names = heldout.domains.map(escaped);
        const shares = names.map((_, domain) => expertNumbers.map((e) => byDomain.at(index, layer, e, domain)));
        fillRatios("domains", shares, expertNumbers, names, `Domains, layer ${layer}`);
        fill("expert-domains", [{ x: names, y: column(shares, expert) }]);
      }
      if (byWord) {
        const index = at(byWord);
        const rows = heldout.words.map((word, number) => {
          const shares = expertNumbers.map((e) => byWord.at(index, layer, e, number));
          return { word: escaped(word), shares, best: shares.indexOf(Math.max(...shares)) };
        });
        rows.sort((a, b) => a.best - b.best || b.shares[b.best] - a.shares[a.best]);
        const words = rows.map(({ word }, number) => `${word}${"\u200b".repeat(number)}`); // Equal names are one row.
        fillRatios("words", rows.map(({ shares }) => shares), expertNumbers, words, `Token ids, layer ${layer}`);
        const preferred = rows.map(({ word, shares }) => [word, shares[expert]]).sort((a, b) => b[1] - a[1]).slice(0, 12);
        fill("expert-words", [{ x: preferred.map(([word], number) => `${word}${"\u200b".repeat(number)}`), y: column(preferred, 1) }]);
      }
      if (pairs) {
        const index = at(pairs);
        const shares = expertNumbers.map((i) => expertNumbers.map((j) => (i === j ? NaN : pairs.at(index, layer, i, j))));
        fillMap("pairs", shares, expertNumbers, expertNumbers, `Co-activation, layer ${layer}`, { zmin: 0 });
        const partners = expertNumbers.filter((e) => e !== expert && shares[expert][e] > 0);
        partners.sort((a, b) => shares[expert][b] - shares[expert][a]);
        const most = partners.slice(0, 16);
        fill("expert-partners", [{ x: most.map(String), y: most.map((e) => shares[expert][e]) }]);
      }
    }

    // ------------------------------------------------------------------------------------------------ held-out text
    const spans = [];

    function layOutText() {
      byId("text-size").textContent = `${text.pieces.length} of ${text.of} tokens of the probe`;
      let token = 0;
      for (const { domain, size } of text.excerpts) {
        const paragraph = document.createElement("p");
        paragraph.dataset.domain = domain;
        for (const end = token + size; token < end; token++) {
          const span = document.createElement("span");
          span.textContent = text.pieces[token];
          span.dataset.token = token;
          spans.push(span);
          paragraph.append(span);
        }
        byId("text").append(paragraph);
      }
      byId("text").addEventListener("click", ({ target }) => {
        if (target.dataset.token) choose({ token: Number(target.dataset.token) });
      });
      byId("domain").append(new Option("all", ""), ...heldout.domains.map((name) => new Option(name, name)));
      byId("domain").addEventListener("change", ({ target }) => choose({ domain: target.value }));
    }

    function weightOf(index, layer, token, expert) {
      for (let k = 0; k < topK; k++)
        if (text.experts.at(index, layer, token, k) === expert) return text.weights.at(index, layer, token, k);
      return 0;
    }

    function colourText() {
      if (!text) return;
      const index = lastBefore(text.steps, step());
      setText("#tokens .probe-step", `Probe of step ${text.steps[index]}.`);
      const weights = spans.map((_, token) => weightOf(index, state.layer, token, state.expert));
      const most = weights.reduce((a, b) => Math.max(a, b), 1e-9);
      spans.forEach((span, token) => {
        const share = weights[token] / most;
        span.style.backgroundColor = share > 0 ? `rgb(230 159 0 / ${Math.round(15 + 65 * share)}%)` : "";
        span.title = share > 0 ? `weight ${weights[token].toFixed(3)}` : "";
      });
    }

    function showDomain() {
      for (const paragraph of byId("text")?.children ?? [])
        paragraph.hidden = state.domain !== "" && paragraph.dataset.domain !== state.domain;
    }

    function drawPath() {
      if (!text) return;
      spans.forEach((span, token) => span.classList.toggle("chosen", token === state.token));
      const index = lastBefore(text.steps, step());
      const { token } = state;
      const piece = text.pieces[token];
      byId("token-name").textContent = `Token ${token}: ${JSON.stringify(piece)}, at the probe of step ${text.steps[index]}`;
      const parts = numbers(topK).map((k) => ({
        x: layerNumbers.map((layer) => text.experts.at(index, layer, token, k)),
        weights: layerNumbers.map((layer) => text.weights.at(index, layer, token, k)),
      }));
      const most = Math.max(1e-9, ...parts.flatMap(({ weights }) => weights));
      const dots = (part, color) => ({
        x: part.x, y: layerNumbers, customdata: part.weights,
        marker: { color, size: part.weights.map((weight) => 5 + 15 * Math.sqrt(weight / most)), opacity: 0.9 },
      });
      const rest = parts.slice(1);
      const others = {
        x: rest.flatMap(({ x }) => x), y: rest.flatMap(() => layerNumbers), customdata: rest.flatMap(({ weights }) => weights),
        marker: { color: "#e69f00", size: rest.flatMap(({ weights }) => weights.map((weight) => 5 + 15 * Math.sqrt(weight / most))) },
      };
      const margins = layerNumbers.map((layer) => text.margins.at(index, layer, token));
      fill("path", [dots(parts[0], "#1b87c9"), others, { y: layerNumbers, x: margins }]);
    }

    // ---------------------------------------------------------------------------------------------------- two steps
    function drawComparison() {
      [byId("from").value, byId("to").value] = [state.from, state.to];
      const lacking = lackOf(...new Set([state.from, state.to]));
      const [from, to] = [state.from, state.to].map((frame) => (lacking.length ? unloaded : router.values[frame]));
      const change = to.map((row, layer) => row.map((load, expert) => (lacking.length ? null : load - from[layer][expert])));
      const most = Math.max(1e-9, ...change.flat().map(Math.abs));
      const hovertemplate = "expert %{x}, MoE layer %{y}<br>%{customdata:+.3g}<extra></extra>";
      const values = { z: change, customdata: change, x: expertNumbers, y: layerNumbers };
      fill("change", [{ ...values, zmin: -most, zmax: most, colorbar: {}, hovertemplate }], { annotations: noteOf(lacking) });
      if (!text) return;
      const [a, b] = [state.from, state.to].map((frame) => lastBefore(text.steps, router.steps[frame]));
      byId("compared").textContent = `Tokens: probes of steps ${text.steps[a]} and ${text.steps[b]}`;
      const chosen = (index, layer, token) => numbers(topK).map((k) => text.experts.at(index, layer, token, k));
      const flows = expertNumbers.map(() => Array(experts).fill(0));
      const changed = layerNumbers.map((layer) => {
        let tokens = 0;
        for (let token = 0; token < text.pieces.length; token++) {
          const [before, after] = [chosen(a, layer, token), chosen(b, layer, token)];
          const [left, entered] = [before.filter((e) => !after.includes(e)), after.filter((e) => !before.includes(e))];
          tokens += left.length > 0;
          if (layer === state.layer) left.forEach((e, position) => (flows[e][entered[position]] += 1));
        }
        return tokens / text.pieces.length;
      });
      fill("moved-layers", [{ x: layerNumbers.map(String), y: changed }]);
      fillMap("moved", flows, expertNumbers, expertNumbers, `Assignments that moved, layer ${state.layer}`, { zmin: 0 });
    }

    // -------------------------------------------------------------------------------- one state, drawn once per frame
    // Each part of the page names the choices that it depends on.
    const parts = [
      [drawFrame, ["frame"]],
      [drawLayer, ["layer"]],
      [drawChosen, ["frame", "layer", "expert"]],
      [drawExpert, ["layer", "expert"]],
      [drawStatistics, ["frame", "layer", "expert"]],
      [colourText, ["frame", "layer", "expert"]],
      [showDomain, ["domain"]],
      [drawPath, ["frame", "token"]],
      [drawComparison, ["from", "to", "layer"]],
    ];
    const changed = new Set();

    function draw() {
      const now = new Set(changed);
      changed.clear();
      for (const [part, inputs] of parts) if (inputs.some((input) => now.has(input))) part();
    }

    choose = (choices) => {
      if ("frame" in choices) choices.frame = Math.min(Math.max(choices.frame, 0), router.steps.length - 1);
      if (changed.size === 0) requestAnimationFrame(draw);
      Object.assign(state, choices);
      Object.keys(choices).forEach((key) => changed.add(key));
    };

    const options = (id, names) => byId(id).append(...names.map((name, index) => new Option(name, index)));
    options("layer", layerNumbers);
    options("expert", expertNumbers);
    options("from", router.steps);
    options("to", router.steps);
    byId("step").max = router.steps.length - 1;
    byId("step").addEventListener("input", ({ target }) => choose({ frame: Number(target.value) }));
    for (const id of ["layer", "expert", "from", "to"])
      byId(id).addEventListener("change", ({ target }) => choose({ [id]: Number(target.value) }));
    const onClick = (name, function_) => has(name) && byId(name).on("plotly_click", ({ points: [point] }) => function_(point));
    for (const name of ["load", "change"]) onClick(name, (point) => choose({ layer: point.y, expert: point.x }));
    onClick("history", (point) => choose({ frame: first + nearest(loadSteps, point.x), expert: point.y }));
    onClick("path", (point) => point.data.xaxis !== "x2" && choose({ layer: point.y, expert: point.x }));
    for (const name of ["domains", "words"]) onClick(name, (point) => choose({ expert: Number(point.x) }));
    onClick("expert-partners", (point) => choose({ expert: Number(point.x) }));
    onClick("moved-layers", (point) => choose({ layer: Number(point.x) }));
    document.querySelectorAll("[data-step]").forEach((button) =>
      button.addEventListener("click", () => {
        const layer = Number(button.dataset.layer ?? state.layer);
        choose({ frame: nearest(router.steps, Number(button.dataset.step)), layer: layer < layers ? layer : state.layer });
      }));

    let timer = null;
    const pause = () => {
      clearInterval(timer);
      timer = null;
      byId("play").textContent = "▶";
    };
    byId("play").addEventListener("click", () => {
      if (timer !== null) return pause();
      if (state.frame === router.steps.length - 1) choose({ frame: 0 });
      byId("play").textContent = "⏸";
      timer = setInterval(() => {
        choose({ frame: state.frame + 1 });
        if (state.frame === router.steps.length - 1) pause();
      }, Math.max(80, Math.min(500, 12000 / router.steps.length)));
    });

    if (text) layOutText();
    const fullest = last[0].indexOf(Math.max(...last[0]));
    choose({ ...state, frame: router.steps.length - 1, expert: fullest, from: first, to: router.steps.length - 1 });
    requestAnimationFrame(() => (document.body.dataset.ready = "yes"));
  }
})().catch((error) => {
  const line = document.getElementById("failure");
  line.textContent = `The figures cannot be drawn: ${error}`;
  line.hidden = false;
  throw error;
});
