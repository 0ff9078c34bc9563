"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const byName = Object.fromEntries(data.models.map(m => [m.name, m]));
const ranked = data.ranked.map(n => byName[n]);
const $ = id => document.getElementById(id);
const make = (tag, text, cls) => { const e = document.createElement(tag); if (text !== undefined) e.textContent = text; if (cls) e.className = cls; return e; };
const fig = (x, d = 3) => x === null || x === undefined ? "–" : x === 0 ? "0" : Math.abs(x) < 1e-4 ? x.toExponential(1) : Math.abs(x) >= 10 ** d ? x.toFixed(0) : x.toPrecision(d);
const fixed = (x, d) => x === null || x === undefined ? "–" : x.toFixed(d);
const size = b => b >= 1e9 ? (b / 1e9).toFixed(2) + " GB" : (b / 1e6).toFixed(2) + " MB";
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const narrow = () => window.innerWidth < 640;

// ---- heading and cards
$("title").textContent = data.reference.name;
const t = data.text;
$("lead").textContent = `${data.models.length} quantized model${data.models.length === 1 ? "" : "s"} against the reference on ` +
  `${t.tokens_scored.toLocaleString("en")} tokens of ${t.name}.`;
function card(big, small) { const c = make("div", undefined, "card"); c.append(make("span", small), make("b", big)); $("cards").append(c); }
card(size(data.reference.bytes), `reference, ${fixed(data.reference.bpw, 2)} bits per weight`);
if (data.reference.ppl !== null) card(`${fixed(data.reference.ppl, 3)} ± ${fixed(data.reference.ppl_stderr, 2)}`, "its perplexity");
if (ranked.length && ranked[0].kld_mean !== null) card(ranked[0].name, `closest to it, KLD ${fig(ranked[0].kld_mean)}`);
const smallest = [...data.models].sort((a, b) => a.bytes - b.bytes)[0];
if (smallest && data.models.length > 1) card(smallest.name, `smallest, ${size(smallest.bytes)}` + (smallest.kld_mean !== null ? `, KLD ${fig(smallest.kld_mean)}` : ""));
if (data.noise_floor && data.noise_floor.kld_mean !== null) card(fig(data.noise_floor.kld_mean), "noise floor, KLD of bf16 against f32");
if (data.choice) { $("choice").hidden = false; $("choice-why").textContent = data.choice.why; }

// ---- sortable tables
function table(node, columns, rows, start) {
  const head = node.createTHead().insertRow(), body = node.createTBody();
  let current = start, down = false;
  const draw = () => {
    const c = columns[current];
    const sorted = [...rows].sort((a, b) => {
      const x = c.value(a), y = c.value(b);
      if (x === null || x === undefined) return 1;
      if (y === null || y === undefined) return -1;
      return (typeof x === "string" ? x.localeCompare(y) : x - y) * (down ? -1 : 1);
    });
    body.replaceChildren(...sorted.map(r => {
      const tr = make("tr", undefined, r.other ? "other" : "");
      for (const k of columns) {
        const td = tr.insertCell();
        td.textContent = k.show ? k.show(r) : k.value(r);
        if (k === columns[0]) td.title = td.textContent;
        const below = k.small && k.small(r);
        if (below) td.append(make("small", below));
      }
      return tr;
    }));
    [...head.cells].forEach((th, i) => th.setAttribute("aria-sort", i !== current ? "none" : down ? "descending" : "ascending"));
  };
  columns.forEach((c, i) => {
    const th = make("th"), b = make("button", c.name);
    b.type = "button";
    if (c.title) th.title = c.title;
    b.addEventListener("click", () => { down = i === current ? !down : false; current = i; draw(); });
    th.append(b); head.append(th);
  });
  draw();
}
const within = key => r => { const i = r.intervals && r.intervals[key]; return i && i.low !== null ? `${fig(i.low)} – ${fig(i.high)}` : ""; };
const rows = [{ ...data.reference, name: data.reference.name + " (reference)", other: true }];
if (data.noise_floor) rows.push({ ...data.noise_floor, other: true });
rows.push(...data.models);
const columns = [
  { name: "model", value: r => r.name },
  { name: "size", value: r => r.bytes, show: r => size(r.bytes) },
  { name: "mean KLD", value: r => r.kld_mean, show: r => fig(r.kld_mean), small: within("kld_mean") },
  { name: "PPL", value: r => r.ppl, show: r => fixed(r.ppl, 3), small: r => r.ppl_stderr === null ? "" : `± ${fixed(r.ppl_stderr, 3)}` },
  { name: "bpw", value: r => r.bpw, show: r => fixed(r.bpw, 3), small: r => `${fixed(r.bpw_body, 2)} body`, title: "stored bits per weight; body: without embeddings and head" },
  { name: "ln PPL ratio", value: r => r.ln_ppl_ratio, show: r => fig(r.ln_ppl_ratio), small: within("ln_ppl_ratio") },
  { name: "same top-1 %", value: r => r.same_top, show: r => fixed(r.same_top, 2), small: within("same_top") },
  { name: "RMS Δp %", value: r => r.dp_rms, show: r => fixed(r.dp_rms, 2), title: "change of the probability of the token that followed" },
  { name: "mean Δp %", value: r => r.dp_mean, show: r => fixed(r.dp_mean, 3) },
  { name: "KLD median", value: r => r.kld_median, show: r => fig(r.kld_median) },
  { name: "90%", value: r => r.kld_p90, show: r => fig(r.kld_p90) },
  { name: "95%", value: r => r.kld_p95, show: r => fig(r.kld_p95) },
  { name: "99%", value: r => r.kld_p99, show: r => fig(r.kld_p99) },
  { name: "99.9%", value: r => r.kld_p999, show: r => fig(r.kld_p999) },
  { name: "max", value: r => r.kld_max, show: r => fig(r.kld_max) },
  ...data.figures.map(f => ({ name: f.unit ? `${f.label}, ${f.unit}` : f.label, value: r => r.metrics[f.key] ?? null, show: r => fig(r.metrics[f.key]), small: within(f.key), title: f.better ? `${f.better} is better` : undefined })),
];
table($("table"), columns.filter(c => rows.some(r => { const v = c.value(r); return v !== null && v !== undefined; })), rows, 1);
$("table-note").textContent = Object.keys(data.models[0]?.intervals ?? {}).length ? "Small figures are 95% intervals." : "";
if (data.neighbours.length) {
  const ul = make("ul");
  data.neighbours.forEach(n => ul.append(make("li", n)));
  $("neighbours").append(make("p", "Neighbours in rank, difference of mean KLD with its paired 95% interval:", "note"), ul);
}

// ---- charts
const COLORS = ["#2459a9", "#c2541c", "#1c7a4c", "#8b3fa0", "#b08900", "#0c8599", "#d6336c", "#6b7280", "#5f3dc4", "#74b816", "#a0522d", "#495057"];
const DARK = ["#7fb0ff", "#ff9d66", "#6fd3a0", "#d59cf0", "#f2cd5c", "#66d9e8", "#faa2c1", "#aeb6c2", "#b197fc", "#c0eb75", "#e0a98a", "#dee2e6"];
const dark = matchMedia("(prefers-color-scheme: dark)");
const color = name => (dark.matches ? DARK : COLORS)[data.models.findIndex(m => m.name === name) % COLORS.length];
const axis = extra => ({ gridcolor: css("--grid"), linecolor: css("--line"), zeroline: false, automargin: true, ticks: "", ...extra });
const layout = extra => ({
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), family: "inherit", size: narrow() ? 11 : 13 },
  margin: { l: 56, r: 16, t: 12, b: 48 }, hoverlabel: { align: "left", font: { family: "inherit" } }, hovermode: "closest", ...extra,
});
const config = { responsive: true, displaylogo: false, displayModeBar: false };
const html = s => s.replace(/[&<>]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const draw = (id, traces, lay) => Plotly.react($(id), traces, lay, config);
const LOG = { type: "log", dtick: 1, exponentformat: "none", minor: { showgrid: false } };
// plotly labels 10^k only; these read better over one or two decades
function logTicks(values) {
  const good = values.filter(v => v > 0), lo = Math.min(...good), hi = Math.max(...good), at = [];
  const steps = Math.log10(hi / lo) > 3 ? [1] : Math.log10(hi / lo) > 1.5 ? [1, 3] : [1, 2, 5];
  for (let k = Math.floor(Math.log10(lo)) - 1; k <= Math.ceil(Math.log10(hi)); k++) for (const s of steps) at.push(Number((s * 10 ** k).toPrecision(2)));
  return { type: "log", tickmode: "array", tickvals: at, ticktext: at.map(v => v < 1e-4 ? v.toExponential(0) : String(v)) };
}
// for each point the side of its label that covers the fewest labels and points
function labelSides(points) {
  const SIDES = { "top right": [1, -1], "bottom left": [-1, 1], "top left": [-1, -1], "bottom right": [1, 1], "middle right": [1, 0], "middle left": [-1, 0] };
  const box = (p, [h, v]) => { const x = h > 0 ? p.x + 6 : p.x - 6 - p.w, y = v > 0 ? p.y + 4 : v < 0 ? p.y - 4 - p.h : p.y - p.h / 2; return { x, y, X: x + p.w, Y: y + p.h }; };
  const meet = (a, b) => Math.max(0, Math.min(a.X, b.X) - Math.max(a.x, b.x)) * Math.max(0, Math.min(a.Y, b.Y) - Math.max(a.y, b.y));
  const dots = points.map(p => ({ x: p.x - 7, y: p.y - 7, X: p.x + 7, Y: p.y + 7 })), taken = [];
  return points.map((p, i) => {
    const cost = Object.entries(SIDES).map(([name, s], rank) => {
      const b = box(p, s);
      return [taken.reduce((n, t) => n + meet(b, t), 0) + dots.reduce((n, d, j) => n + (i === j ? 0 : meet(b, d)), 0) + (b.x < 0 ? 100 : 0) + rank * .1, name, b];
    }).sort((a, b) => a[0] - b[0])[0];
    taken.push(cost[2]);
    return cost[1];
  });
}
function sizeChart() {
  const ms = data.models.filter(m => m.kld_mean > 0);
  if (!ms.length) { $("plot-size").closest("section").hidden = true; return; }
  const big = Math.max(...ms.map(m => m.bytes)) >= 1e9, unit = big ? 1e9 : 1e6;
  const order = [...ms].sort((a, b) => a.bytes - b.bytes || a.kld_mean - b.kld_mean), front = [];
  for (const m of order) if (!front.length || m.kld_mean < front[front.length - 1].kld_mean) front.push(m);
  const iv = m => m.intervals.kld_mean && m.intervals.kld_mean.low !== null ? m.intervals.kld_mean : { low: m.kld_mean, high: m.kld_mean };
  const ys = order.flatMap(m => [iv(m).low, iv(m).high]), shapes = [], notes = [];
  const floor = data.noise_floor && data.noise_floor.kld_mean;
  if (floor > 0) {
    ys.push(floor);
    shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: floor, y1: floor, line: { color: css("--soft"), dash: "dot", width: 1 } });
    notes.push({ xref: "paper", x: 0, y: Math.log10(floor), xanchor: "left", yanchor: "bottom", text: "noise floor (bf16)", showarrow: false, font: { size: 11, color: css("--soft") } });
  }
  const xs = order.map(m => m.bytes / unit), span = Math.max(...xs) - Math.min(...xs) || Math.max(...xs) * .2;
  const low = Math.log10(Math.min(...ys.filter(y => y > 0))), high = Math.log10(Math.max(...ys)), pad = Math.max(.12, (high - low) * .08);
  // where the points will stand, in pixels
  const width = $("plot-size").clientWidth - 90, height = (narrow() ? 380 : 460) - 75;
  const x0 = Math.min(...xs) - span * (narrow() ? .2 : .1), x1 = Math.max(...xs) + span * (narrow() ? .28 : .14), y0 = low - pad, y1 = high + pad;
  const px = order.map((m, i) => ({ x: (xs[i] - x0) / (x1 - x0) * width, y: (y1 - Math.log10(m.kld_mean)) / (y1 - y0) * height, w: m.name.length * (narrow() ? 6 : 7.2), h: narrow() ? 12 : 14 }));
  const traces = [{ x: front.map(m => m.bytes / unit), y: front.map(m => m.kld_mean), mode: "lines", line: { color: css("--line"), width: 2 }, hoverinfo: "skip", showlegend: false }];
  traces.push({
    x: order.map(m => m.bytes / unit), y: order.map(m => m.kld_mean), mode: "markers+text", text: order.map(m => html(m.name)), textposition: labelSides(px),
    textfont: { size: narrow() ? 10 : 12, color: css("--ink") }, marker: { size: 11, color: order.map(m => color(m.name)), line: { color: css("--card"), width: 1.5 } },
    error_y: { type: "data", symmetric: false, array: order.map(m => iv(m).high - m.kld_mean), arrayminus: order.map(m => m.kld_mean - iv(m).low), color: css("--soft"), thickness: 1.2, width: 4 },
    hovertext: order.map(m => `<b>${html(m.name)}</b><br>${size(m.bytes)}, ${fixed(m.bpw, 2)} bpw<br>KLD ${fig(m.kld_mean)} (${fig(iv(m).low)} – ${fig(iv(m).high)})<br>PPL ${fixed(m.ppl, 3)}`),
    hoverinfo: "text", cliponaxis: false, showlegend: false,
  });
  draw("plot-size", traces, layout({
    height: narrow() ? 380 : 460, shapes, annotations: notes,
    xaxis: axis({ title: { text: big ? "file size, GB" : "file size, MB" }, range: [x0, x1] }),
    yaxis: axis({ title: { text: "mean KLD, nats" }, ...logTicks(ys), range: [y0, y1] }),
  }));
}
const TAIL = [["kld_median", "median"], ["kld_p90", "90%"], ["kld_p95", "95%"], ["kld_p99", "99%"], ["kld_p999", "99.9%"], ["kld_max", "max"]];
function tailChart() {
  const ms = ranked.filter(m => m.kld_median !== null);
  if (!ms.length) { $("plot-tail").closest("section").hidden = true; return; }
  const traces = ms.map(m => ({
    x: TAIL.map(k => k[1]), y: TAIL.map(k => m[k[0]] > 0 ? m[k[0]] : null), name: html(m.name), mode: "lines+markers", line: { color: color(m.name), width: 2 }, marker: { size: 6 },
    hovertemplate: `<b>${html(m.name)}</b><br>%{x}: %{y:.3g}<extra></extra>`,
  }));
  draw("plot-tail", traces, layout({
    height: narrow() ? 400 : 420, showlegend: true, legend: narrow() ? { orientation: "h", y: -.18 } : { traceorder: "reversed" },
    xaxis: axis({ type: "category" }), yaxis: axis({ title: { text: "KLD, nats" }, ...logTicks(traces.flatMap(r => r.y)) }),
  }));
}
function flipsChart() {
  const ms = [...ranked].filter(m => m.flips).reverse();
  if (!ms.length) { $("flips").hidden = true; return; }
  const kinds = [["right_to_wrong", "right → wrong", "--warm"], ["wrong_to_wrong", "wrong → another wrong", "--soft"], ["wrong_to_right", "wrong → right", "--good"]];
  draw("plot-flips", kinds.map(([k, name, c]) => ({
    type: "bar", orientation: "h", name, y: ms.map(m => html(m.name)), x: ms.map(m => 100 * m.flips[k] / t.tokens_scored), marker: { color: css(c) },
    hovertemplate: `%{y}<br>${name}: %{x:.2f}%<extra></extra>`,
  })), layout({ barmode: "stack", height: 120 + 30 * ms.length, legend: { orientation: "h", y: 1.02, yanchor: "bottom", traceorder: "normal" }, margin: { l: 90, r: 16, t: 36, b: 44 }, bargap: .35, xaxis: axis({ title: { text: "% of scored tokens" } }), yaxis: axis({ type: "category" }) }));
}
const WHAT = { weighted_error: ["output error", "Relative error of each layer's output: the error of its weights, weighted by the mean square of each input. Inputs are the reference's on this evaluation text (its first 16,384 tokens): this shows the loss that was measured, not what guided quantization."],
  rel_rmse: ["weight error", "Relative root-mean-square error of the weights."], bpw: ["bits per weight", "Stored bits per weight."] };
function heatChart() {
  const m = byName[$("heat-model").value], what = $("heat-what").value;
  const inner = m.tensors.filter(x => x.layer !== null), outer = m.tensors.filter(x => x.layer === null);
  const worth = x => x.shape.length > 1 && x[what] !== null;
  const roles = [...new Set(inner.filter(worth).map(x => x.role))], extra = [...new Set(outer.filter(worth).map(x => x.role))];
  const layers = [...new Set(inner.map(x => x.layer))].sort((a, b) => a - b);
  const names = [...layers.map(l => `layer ${l}`), ...(extra.length ? ["outside"] : [])];
  const columns = [...roles, ...extra];
  const at = (row, role) => row < layers.length ? inner.find(x => x.layer === layers[row] && x.role === role) : outer.find(x => x.role === role);
  const grid = names.map((_, i) => columns.map(r => at(i, r)));
  const z = grid.map(row => row.map(x => x && x[what] !== null && x[what] !== undefined ? x[what] : null));
  const few = names.length * columns.length <= 160 && !narrow();
  $("heat-note").textContent = WHAT[what][1];
  const width = narrow() ? Math.max($("plot-heat").parentElement.clientWidth, 72 + 30 * columns.length) : undefined;
  draw("plot-heat", [{
    type: "heatmap", x: columns, y: names, z, xgap: 2, ygap: 2, hoverongaps: false, colorscale: [[0, css("--low")], [1, css("--high")]],
    text: grid.map(row => row.map(x => x ? (few ? `${x.type}<br>${fig(x[what], 2)}` : "") : "")), texttemplate: "%{text}", textfont: { size: 10 },
    customdata: grid.map(row => row.map(x => x ? `<b>${html(x.name)}</b><br>${x.type}, ${fixed(x.bpw, 2)} bpw, ${x.shape.join("×")}<br>weight error ${fig(x.rel_rmse)}<br>output error ${fig(x.weighted_error)}` : "")),
    hovertemplate: "%{customdata}<extra></extra>", colorbar: { outlinewidth: 0, ...(narrow() ? { orientation: "h", thickness: 10, x: 0, xanchor: "left", y: 1.01, yanchor: "bottom", len: .9 } : { thickness: 12 }) },
  }], layout({ width, autosize: !narrow(), height: Math.min(1400, (narrow() ? 150 : 110) + names.length * (few ? 44 : 24)), margin: { l: 64, r: 8, t: narrow() ? 40 : 8, b: 80 }, xaxis: axis({ type: "category", tickangle: -40, showgrid: false }), yaxis: axis({ type: "category", autorange: "reversed", showgrid: false }) }));
}
function growthChart() {
  const ms = ranked.filter(m => m.hidden_error.length);
  if (!ms.length) { $("growth").hidden = true; return; }
  draw("plot-growth", ms.map(m => ({ x: m.hidden_error.map((_, i) => i), y: m.hidden_error, name: html(m.name), mode: "lines+markers", line: { color: color(m.name), width: 2 }, marker: { size: 5 }, hovertemplate: `<b>${html(m.name)}</b><br>after block %{x}: %{y:.3g}<extra></extra>` })),
    layout({ height: narrow() ? 360 : 380, showlegend: true, legend: narrow() ? { orientation: "h", y: -.22 } : { traceorder: "reversed" }, xaxis: axis({ title: { text: "block" }, dtick: ms[0].hidden_error.length <= 40 ? 1 : undefined }), yaxis: axis({ title: { text: "relative error" }, ...logTicks(ms.flatMap(m => m.hidden_error)) }) }));
}
const options = (node, pairs) => pairs.forEach(([v, label]) => { const o = make("option", label); o.value = v; node.append(o); });
const withTensors = ranked.filter(m => m.tensors.some(x => x.rel_rmse !== null));
if (withTensors.length) {
  options($("heat-model"), withTensors.map(m => [m.name, m.name]));
  $("heat-model").value = withTensors[withTensors.length - 1].name;
  const has = k => withTensors.some(m => m.tensors.some(x => x[k] !== null));
  options($("heat-what"), Object.entries(WHAT).filter(([k]) => has(k)).map(([k, v]) => [k, v[0]]));
  for (const id of ["heat-model", "heat-what"]) $(id).addEventListener("change", heatChart);
} else $("tensors").hidden = true;

// ---- answers
const sim = data.similarity;
if (sim) {
  $("answers-note").textContent = `${sim.prompts} prompts answered greedily, ${sim.tokens} tokens each; cosine by ${sim.embedder}. ` +
    "Cosine alone saturates, so read it between the ceiling (the reference in bf16) and the floor (answers to other prompts).";
  const line = (name, s, other) => ({ name, other, ...s });
  const list = [line("ceiling (reference in bf16)", sim.ceiling, true), ...data.models.filter(m => m.similarity).map(m => line(m.name, m.similarity)), line("floor (shuffled pairs)", sim.floor, true)];
  table($("answers-table"), [
    { name: "model", value: r => r.name }, { name: "cosine", value: r => r.cosine, show: r => fixed(r.cosine, 4) },
    { name: "between floor and ceiling", value: r => r.scaled ?? null, show: r => r.scaled === null || r.scaled === undefined ? "–" : fixed(100 * r.scaled, 1) + " %" },
    { name: "equal tokens", value: r => r.equal_tokens, show: r => fixed(100 * r.equal_tokens, 1) + " %" },
    { name: "first divergent token", value: r => r.first_divergence, show: r => fixed(r.first_divergence, 0), title: "median over prompts; the answer's length where nothing differs" },
    { name: "unchanged", value: r => r.unchanged, show: r => `${fixed(r.unchanged, 0)} of ${sim.prompts}` }], list, 1);
  options($("answers-model"), ranked.filter(m => m.similarity).map(m => [m.name, m.name]));
  $("answers-model").selectedIndex = $("answers-model").options.length - 1;
  options($("answers-prompt"), sim.answers.map((a, i) => [i, a.prompt.length > 60 ? a.prompt.slice(0, 60) + "…" : a.prompt]));
  const show = () => {
    const a = sim.answers[$("answers-prompt").value], name = $("answers-model").value, mine = a.models[name], ref = a.reference;
    let first = 0;
    while (first < Math.min(ref.length, mine.length) && ref[first] === mine[first]) first++;
    const fill = (node, pieces, other) => {
      node.replaceChildren(make("span", a.prompt, "prompt"));
      pieces.forEach((p, i) => node.append(i < first || p === other[i] ? document.createTextNode(p) : make("mark", p, i === first ? "first" : "after")));
    };
    $("left-name").textContent = `${data.reference.name} (reference)`;
    $("right-name").textContent = name + (first === ref.length && first === mine.length ? ": the same answer" : `: differs from token ${first + 1} on`);
    fill($("left"), ref, mine);
    fill($("right"), mine, ref);
  };
  for (const id of ["answers-model", "answers-prompt"]) $(id).addEventListener("change", show);
  show();
} else $("answers").hidden = true;

// ---- tasks and method
if (data.tasks) {
  const names = data.tasks.names, all = [data.reference, ...data.models];
  table($("tasks-table"), [{ name: "model", value: r => r.name }, ...names.map(n => ({
    name: n, value: r => r.tasks && r.tasks[n] ? r.tasks[n].value : null,
    show: r => r.tasks && r.tasks[n] ? `${r.tasks[n].metric} ${fixed(r.tasks[n].value, 4)}` : "–",
    small: r => r.tasks && r.tasks[n] && r.tasks[n].flips ? `${r.tasks[n].flips.total} flips` : "" }))], all, 0);
} else $("tasks").hidden = true;
for (const [k, v] of data.method) $("method").append(make("dt", k), make("dd", v));

function drawAll() { sizeChart(); tailChart(); flipsChart(); if (withTensors.length) heatChart(); growthChart(); }
drawAll();
dark.addEventListener("change", drawAll);
let was = narrow();
addEventListener("resize", () => { if (narrow() !== was) { was = narrow(); drawAll(); } });
