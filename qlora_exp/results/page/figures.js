// The figures: each has a caption, a legend of buttons, a text for screen readers, and its numbers as a table.
const FONT = { family: 'system-ui, "Segoe UI", Roboto, sans-serif', size: 12, color: "#1b2733" };
const CONFIG = { responsive: true, displaylogo: false, showSendToCloud: false, typesetMath: false, plotlyServerURL: "", modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"] };
const AXIS = { automargin: true, gridcolor: "#e6ebef", zeroline: false, linecolor: "#8795a1", showline: true, ticks: "outside", tickcolor: "#8795a1" };
const HEIGHT = 430;
const OTHER = "#b4bec7";  // rows that are not chosen
const sign = data.metric.lower ? 1 : -1;
const dash = look => look.dashes.length ? look.dashes.map(length => `${length}px`).join(",") : "solid";
const isNarrow = () => window.innerWidth < 700;
const brief = row => safe(isNarrow() ? rows[row].brief : clip(rows[row].name, 60)) + (row !== data.baseline ? "" : isNarrow() ? " (base)" : " (baseline)");
const about = row => [wrapped(rows[row].name), ...Object.entries(rows[row].label).map(([key, value]) => wrapped(`${key} = ${clip(value, 200)}`, 70, 3))].join("<br>");
const chosen = () => order.filter(row => drawn.has(row));
const HOVER = "%{customdata}<extra></extra>";  // names stand in customdata: in a template they would be read as one

function layout(x, y, more = {}) {
  const axis = title => ({ ...AXIS, title: { text: wrapped(title, isNarrow() ? 26 : 56, 3), standoff: 8 } });
  return {
    font: FONT, showlegend: false, paper_bgcolor: "#fff", plot_bgcolor: "#fff", margin: { l: 60, r: 16, t: 12, b: 48 }, height: HEIGHT,
    hoverlabel: { align: "left", bgcolor: "#fff", bordercolor: "#8795a1", font: { ...FONT, color: "#1b2733" } },
    ...more, xaxis: { ...axis(x), tickangle: 0, nticks: isNarrow() ? 4 : 8, ...more.xaxis }, yaxis: { ...axis(y), ...more.yaxis },
  };
}

const figures = [];
class FigureCard {
  constructor(parent, title, caption, make, controls = []) {
    Object.assign(this, { make, hidden: new Set(), seen: false, stale: true, title });
    this.plot = el("div", { className: "plot", aria: { role: "group" } });
    this.legend = el("div", { className: "legend", aria: { role: "group", label: `Legend of ${title}: buttons show or hide` } });
    this.numbers = el("details", { className: "numbers" }, el("summary", {}, "Numbers"), el("div", { tabIndex: 0, aria: { role: "region", label: `Numbers of ${title}` } }));
    this.numbers.addEventListener("toggle", () => this.showNumbers());
    const panel = controls.length ? el("div", { className: "controls" }, ...controls) : "";
    const heading = el("h3", {}, title);
    this.card = el("figure", { className: "card" }, heading, el("figcaption", { className: "caption" }, caption), panel, this.plot, this.legend, this.numbers);
    parent.append(this.card);
    new IntersectionObserver(([entry]) => { this.seen = entry.isIntersecting; this.update(); }, { rootMargin: "300px" }).observe(this.card);
    figures.push(this);
  }
  redraw() { this.stale = true; this.update(); }
  update() {  // a figure is drawn when it comes into view
    if (!this.seen || !this.stale) return;
    this.stale = false;
    const made = this.make(this.hidden, this.plot.clientWidth || this.card.clientWidth - 40);
    this.card.hidden = !made;
    if (!made) return;
    this.plot.setAttribute("aria-label", `${this.title}. ${made.label} The numbers are in the table below the figure.`);
    this.plot.classList.toggle("tall", made.layout.height > 700);
    Object.assign(this.plot.style, { height: `${made.layout.height}px`, minHeight: "0" });
    this.made = made;
    const keys = (made.legend ?? []).map(([key, look, name]) => {
      const button = el("button", { type: "button", aria: { pressed: !this.hidden.has(key) } }, swatch(look), name);
      button.addEventListener("click", () => {
        this.hidden.has(key) ? this.hidden.delete(key) : this.hidden.add(key);
        this.redraw();
        [...this.legend.children].find(other => other.textContent === name)?.focus();
      });
      return button;
    });
    this.legend.replaceChildren(...keys);
    this.legend.hidden = !keys.length;
    const config = { ...CONFIG, toImageButtonOptions: { format: "svg", filename: this.title.toLowerCase().replaceAll(/\W+/g, "_") } };
    Plotly.react(this.plot, made.traces, made.layout, config).then(() => {
      for (const drawing of this.plot.querySelectorAll(".main-svg")) drawing.setAttribute("aria-hidden", "true");  // its text stands in the label
      if (this.plot.wired) return;
      this.plot.wired = true;
      this.plot.on("plotly_relayout", () => this.made.zoomed?.(this.plot));
      this.plot.on("plotly_click", event => this.made.clicked?.(event.points[0]));
    });
    this.showNumbers();
  }
  showNumbers() {
    if (!this.numbers.open || !this.made) return;
    const [head, body] = this.made.numbers();
    const shown = body.slice(0, 1000);
    this.numbers.lastElementChild.replaceChildren(grid(head, shown), shown.length < body.length ? el("p", {}, `The first ${shown.length} of ${body.length.toLocaleString("en")} lines.`) : "");
  }
}
function control(label, input, changes) {
  input.addEventListener("input", changes);
  return el("label", {}, `${label} `, input);
}
function select(options) { return el("select", {}, ...options.map((text, value) => el("option", { value }, text))); }
const rowLegend = shown => shown.map(row => [row, data.looks[row], rows[row].name]);

// Names of points where they fit, as pixels: no name covers another one, or a point.
function placed(points, xs, ys, size) {
  const pixel = (value, [low, high], length, flip) => { const part = (value - low) / (high - low) * length; return flip ? length - part : part; };
  const spots = points.map(point => [pixel(point.x, xs, size.width), pixel(point.y, ys, size.height, true)]);
  const taken = spots.map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  const result = [];
  points.forEach((point, index) => {
    const [x, y] = spots[index], width = 6 * point.name.length + 4, height = 18;
    if (x < 0 || y < 0 || x > size.width || y > size.height) return;
    const places = [[8, -18, "left"], [8, 0, "left"], [-8 - width, -18, "right"], [-8 - width, 0, "right"], [-width / 2, -26, "center"], [-width / 2, 8, "center"]];
    for (const [right, down, anchor] of places) {
      const box = [x + right, y + down, x + right + width, y + down + height];
      const fits = box[0] >= 0 && box[1] >= 0 && box[2] <= size.width && box[3] <= size.height;
      if (!fits || taken.some((other, place) => place !== index && box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1])) continue;
      taken.push(box);
      const shift = anchor === "left" ? right : anchor === "right" ? right + width : 0;
      result.push({ x: point.x, y: point.y, text: safe(point.name), showarrow: false, xanchor: anchor, yanchor: "top", xshift: shift, yshift: -down, font: { size: 11 } });
      break;
    }
  });
  return result;
}
function ranged(values, pad = 0.06) {
  const low = Math.min(...values), high = Math.max(...values), room = (high - low || Math.abs(high) || 1) * pad;
  return [low - room, high + room];
}

const costs = select(data.costs.map(cost => cost.name));
function tradeoff() {
  const cost = data.costs[costs.value || 0];
  const all = order.filter(row => rows[row].value && cost && known(cost.values[row]));
  if (all.length < 2) return null;
  const way = cost.better === "lower" ? 1 : -1, x = row => cost.values[row], y = row => rows[row].value[0];
  const beats = (a, b) => way * x(a) <= way * x(b) && sign * y(a) <= sign * y(b) && (x(a) !== x(b) || y(a) !== y(b));
  const front = all.filter(row => !all.some(other => beats(other, row))).sort((a, b) => x(a) - x(b));
  const onFront = new Set(front), own = all.filter(row => drawn.has(row)), others = all.filter(row => !drawn.has(row));
  const hover = row => `${about(row)}<br>${safe(data.metric.name)}: ${short(y(row))}<br>${safe(cost.name)}: ${short(x(row))}${onFront.has(row) ? "<br>on the Pareto front" : ""}`;
  const trace = (shown, marker) => ({ type: "scatter", mode: "markers", x: shown.map(x), y: shown.map(y), customdata: shown.map(hover), hovertemplate: HOVER, marker });
  const traces = [
    { type: "scatter", mode: "lines", x: front.map(x), y: front.map(y), line: { color: "#1b2733", width: 1, shape: way > 0 ? "hv" : "vh" }, hoverinfo: "skip" },
    trace(others, { color: OTHER, size: 7, line: { width: others.map(row => onFront.has(row) ? 1.5 : 0), color: "#1b2733" } }),
    trace(own, {
      color: own.map(row => data.looks[row].colour), symbol: own.map(row => data.looks[row].symbol), size: own.map(row => onFront.has(row) ? 12 : 10),
      line: { width: own.map(row => onFront.has(row) ? 1.5 : 0.5), color: own.map(row => onFront.has(row) ? "#1b2733" : "#fff") },
    }),
  ];
  const xs = ranged(all.map(x)), ys = ranged(all.map(y));
  const points = [...new Set([...front, ...own, ...others])].map(row => ({ x: x(row), y: y(row), name: rows[row].brief }));
  const made = layout(`${cost.name} (${cost.better} is better)`, data.metric.label, { xaxis: { range: xs }, yaxis: { range: ys } });
  const size = () => ({ width: Math.max(100, costs.closest(".card").clientWidth - 110), height: HEIGHT - 62 });
  made.annotations = placed(points, xs, ys, size());
  return {
    traces, layout: made, legend: null,
    zoomed: plot => {
      const found = placed(points, plot.layout.xaxis.range, plot.layout.yaxis.range, size());
      if (JSON.stringify(found) !== JSON.stringify(plot.layout.annotations)) Plotly.relayout(plot, { annotations: found });
    },
    label: `${plural(all.length, "row")}; no row is better in both than: ${front.map(row => rows[row].name).join("; ")}.`,
    numbers: () => [["row", cost.name, data.metric.name, "on the front"], all.map(row => [rows[row].name, short(x(row)), short(y(row)), onFront.has(row) ? "yes" : ""])],
  };
}

function ranked() {
  const shown = chosen().filter(row => rows[row].value).sort((a, b) => sign * (rows[b].value[0] - rows[a].value[0]));
  if (!shown.length) return empty(data.metric.label);
  const values = shown.map(row => rows[row].value), half = values.map(([value, , high]) => known(high) ? high - value : 0);
  const base = rows[data.baseline].value[0], ties = shown.map((row, place) => ({ x: 1, xref: "paper", xanchor: "left", y: place, text: safe(rows[row].ties), showarrow: false, font: { size: 11 } }));
  const traces = [{
    type: "scatter", mode: "markers", x: values.map(([value]) => value), y: shown.map((_, place) => place), hovertemplate: HOVER,
    customdata: shown.map((row, place) => `${about(row)}<br>${safe(data.metric.name)}: ${short(values[place][0])}${half[place] ? ` ± ${short(half[place])}` : ""}${rows[row].ties ? `<br>ties: ${safe(rows[row].ties)}` : ""}`),
    error_x: { type: "data", array: half, color: "#566472", thickness: 1.3, width: 3 },
    marker: { size: 9, color: shown.map(row => data.looks[row].colour), symbol: shown.map(row => data.looks[row].symbol) },
  }];
  const letters = Math.max(0, ...shown.map(row => rows[row].ties.length));
  return {
    traces,
    layout: layout(data.metric.label.replace(" (", "\n("), "", {
      height: 100 + Math.max(5, shown.length) * 22, annotations: ties, margin: { l: 60, r: 20 + 7 * Math.min(letters, 12), t: 12, b: 48 },
      shapes: [{ type: "line", x0: base, x1: base, yref: "paper", y0: 0, y1: 1, line: { color: "#8795a1", dash: "dot", width: 1 } }],
      yaxis: { tickvals: shown.map((_, place) => place), ticktext: shown.map(brief), range: [-0.7, shown.length - 0.3], ticks: "" },
    }),
    label: `Best of ${shown.length}: ${rows[shown.at(-1)].name}, ${short(values.at(-1)[0])}.`,
    numbers: () => [["row", data.metric.name, "low", "high", "ties"], shown.toReversed().map(row => [rows[row].name, ...rows[row].value.map(short), rows[row].ties])],
  };
}
function empty(x) { return { traces: [], layout: layout(x, "", { height: 160, annotations: [{ text: "no row is chosen for figures", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] }), label: "Nothing is chosen.", numbers: () => [["row"], []] }; }

// Curves
const curveNames = Object.keys(data.curves).filter(name => Object.keys(data.curves[name]).length);
const curveSelect = select(curveNames);
const smoothing = el("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0 });
const scale = select(["linear", "logarithmic"]);
const seeds = select(["mean and range", "each seed"]);
function smooth(values, weight) {  // exponential, corrected for the start, as in TensorBoard
  let last = 0, norm = 0;
  return values.map(value => {
    if (!known(value)) return null;
    last = weight * last + (1 - weight) * value; norm = weight * norm + 1 - weight;
    return last / norm;
  });
}
function at(steps, values, step) {  // a seed's value at a step between two of its own
  const after = steps.findIndex(each => each >= step);
  if (after < 0) return null;
  if (steps[after] === step || after === 0) return steps[after] === step ? values[after] : null;
  const [a, b] = [values[after - 1], values[after]];
  return known(a) && known(b) ? a + (b - a) * (step - steps[after - 1]) / (steps[after] - steps[after - 1]) : null;
}
function joined(curves) {  // steps, mean, lowest and highest over seeds
  const steps = [...new Set(curves.flatMap(([steps]) => steps))].sort((a, b) => a - b);
  const same = curves.every(([own]) => own.length === steps.length);
  const columns = steps.map((step, place) => curves.map(([own, values]) => same ? values[place] : at(own, values, step)));
  const whole = columns.map(values => values.every(known));
  const over = reduce => columns.map((values, place) => whole[place] ? reduce(values) : null);
  return [steps, over(mean), over(values => Math.min(...values)), over(values => Math.max(...values))];
}
function curves(hiddenRows) {
  const name = curveNames[curveSelect.value || 0], of = data.curves[name], weight = Number(smoothing.value);
  const byRow = new Map();
  runs.forEach((run, place) => { if (of[place] && drawn.has(run.row)) byRow.set(run.row, [...(byRow.get(run.row) ?? []), [...of[place], run.seed]]); });
  const shown = order.filter(row => byRow.has(row));
  if (!shown.length) return empty("step");
  const traces = [], ends = [];
  for (const row of shown) {
    const look = data.looks[row], own = byRow.get(row).map(([steps, values, seed]) => [steps, smooth(values, weight), seed]);
    const line = { color: look.colour, width: 2, dash: dash(look) }, marker = { color: look.colour, symbol: look.symbol, size: 7, maxdisplayed: 8 };
    const [steps, middle, low, high] = joined(own);
    ends.push([row, own.length, steps.at(-1), middle.findLast(known), Math.min(...middle.filter(known))]);
    if (hiddenRows.has(row)) continue;
    const drawLine = (x, y, what, more) => traces.push({ type: "scatter", mode: "lines+markers", x, y, line, marker, customdata: y.map((value, place) => `${wrapped(rows[row].name)}${what}<br>step ${x[place]}: ${short(value)}`), hovertemplate: HOVER, ...more });
    if (seeds.value === "1") own.forEach(([x, y, seed]) => drawLine(x, y, `, seed ${safe(seed)}`, { line: { ...line, width: 1.3 } }));
    else {
      if (weight && own.length === 1) traces.push({ type: "scatter", mode: "lines", x: steps, y: byRow.get(row)[0][1], line: { ...line, width: 1 }, opacity: 0.25, hoverinfo: "skip" });
      if (own.length > 1) {
        const edge = { type: "scatter", mode: "lines", x: steps, line: { width: 0 }, hoverinfo: "skip" };
        traces.push({ ...edge, y: low }, { ...edge, y: high, fill: "tonexty", fillcolor: `${look.colour}22` });
      }
      drawLine(steps, middle, own.length > 1 ? `<br>mean of ${own.length} seeds` : "");
    }
  }
  return {
    traces, legend: rowLegend(shown),
    layout: layout("step", `${name}, nats per token (lower is better)`, { yaxis: { type: scale.value === "1" ? "log" : "linear" }, hovermode: "closest", height: 460 }),
    label: `${name} of ${plural(shown.length, "row")} over steps.`,
    numbers: () => [["row", "seeds", "last step", "last value", "lowest value"], ends.map(([row, ...values]) => [rows[row].name, ...values.map(short)])],
  };
}

const PATTERNS = ["", "/", ".", "x", "-", "|", "+", "\\"];
function phases() {
  const names = Object.keys(data.phases.added);
  const total = row => names.reduce((sum, name) => sum + data.phases.added[name][row], 0);
  const shown = chosen().filter(total).sort((a, b) => total(b) - total(a));
  if (!shown.length) return names.length ? empty(data.phases.name) : null;
  const traces = names.map((name, place) => ({
    type: "bar", orientation: "h", name, x: shown.map(row => data.phases.added[name][row]), y: shown.map((_, index) => index), hovertemplate: HOVER,
    customdata: shown.map(row => `${about(row)}<br>${safe(name)}: + ${short(data.phases.added[name][row])} MiB<br>peak: ${short(total(row))} MiB`),
    marker: { color: data.looks[place].colour, pattern: { shape: PATTERNS[(place + Math.floor(place / 8)) % 8], fgcolor: "#fff", fillmode: "overlay", size: 7, solidity: 0.25 }, line: { color: "#fff", width: 1 } },
  }));
  return {
    traces,
    layout: layout(data.phases.name.replace(" (", "\n("), "", {
      barmode: "stack", height: 150 + Math.max(4, shown.length) * 24, showlegend: true, bargap: 0.25,
      legend: { orientation: "h", traceorder: "normal", y: 1, yanchor: "bottom", x: 0, font: { size: 11 } }, margin: { l: 60, r: 16, t: 50, b: 48 },
      yaxis: { tickvals: shown.map((_, place) => place), ticktext: shown.map(brief), ticks: "", range: [-0.6, shown.length - 0.4] },
    }),
    label: `Peak memory of ${plural(shown.length, "row")}, from ${short(total(shown.at(-1)))} to ${short(total(shown[0]))} MiB.`,
    numbers: () => [["row", ...names.map(name => `${name}, adds MiB`), "peak, MiB"], shown.toReversed().map(row => [rows[row].name, ...names.map(name => short(data.phases.added[name][row])), short(total(row))])],
  };
}

const rank = row => Number(rows[row].label["method.r"] || NaN), alpha = row => Number(rows[row].label["method.lora_alpha"] || NaN);
function grouped(kind, ok) {
  const groups = new Map();
  for (const row of rows.keys()) if (rows[row].value && ok(row)) groups.set(rows[row].rest[kind], [...(groups.get(rows[row].rest[kind]) ?? []), row]);
  return groups;
}
const MAPS = 12;
function maps(_, width) {
  const groups = [...grouped("map", row => rank(row) >= 0 && alpha(row) >= 0)], shown = groups.slice(0, MAPS), used = shown.flatMap(([, own]) => own);
  if (!used.length) return null;
  const ranks = [...new Set(used.map(rank))].sort((a, b) => a - b), alphas = [...new Set(used.map(alpha))].sort((a, b) => a - b);
  const values = used.map(row => rows[row].value[0]), best = sign > 0 ? Math.min(...values) : Math.max(...values);
  const across = Math.max(1, Math.min(shown.length, Math.floor(width / Math.max(170, 56 * alphas.length + 60)))), down = Math.ceil(shown.length / across);
  const made = layout("", "", { height: down * Math.max(170, 44 * ranks.length + 90) + 40, grid: { rows: down, columns: across, pattern: "independent", xgap: 0.18, ygap: 0.32 } });
  made.coloraxis = { colorscale: "Cividis", reversescale: data.metric.lower, colorbar: { title: { text: wrapped(data.metric.label, 34, 3), side: "right" }, thickness: 12, tickfont: { size: 11 } } };
  if (isNarrow()) Object.assign(made.coloraxis.colorbar, { orientation: "h", y: -0.12, yanchor: "top", title: { text: wrapped(data.metric.label, 46, 3), side: "top" } });
  made.annotations = [];
  const traces = shown.map(([title, own], place) => {
    const end = place ? place + 1 : "", cell = (r, a) => own.find(row => rank(row) === r && alpha(row) === a);
    const table = ranks.map(r => alphas.map(a => cell(r, a)));
    const axis = { ...AXIS, showgrid: false, type: "category", ticks: "" };
    made[`xaxis${end}`] = { ...axis, title: { text: "lora_alpha", standoff: 4 } };
    made[`yaxis${end}`] = { ...axis, title: { text: place % across ? "" : "r", standoff: 4 } };
    made.annotations.push({ text: wrapped(title, 30, 2), xref: `x${end} domain`, yref: `y${end} domain`, x: 0.5, y: 1, yanchor: "bottom", showarrow: false, font: { size: 11 } });
    return {
      type: "heatmap", coloraxis: "coloraxis", xaxis: `x${end}`, yaxis: `y${end}`, x: alphas.map(String), y: ranks.map(String), xgap: 2, ygap: 2, hovertemplate: HOVER,
      z: table.map(line => line.map(row => row === undefined ? null : rows[row].value[0])),
      text: table.map(line => line.map(row => row === undefined ? "" : `${rows[row].value[0] === best ? "★ " : ""}${short(Number(rows[row].value[0].toPrecision(4)))}`)), texttemplate: "%{text}",
      customdata: table.map(line => line.map(row => row === undefined ? "" : `${about(row)}<br>${safe(data.metric.name)}: ${short(rows[row].value[0])}`)),
    };
  });
  if (groups.length > MAPS) made.annotations.push({ text: `${groups.length - MAPS} more maps are not drawn: filter and sort the table instead`, xref: "paper", yref: "paper", x: 0, y: 1.06, xanchor: "left", showarrow: false });
  return {
    traces, layout: made, label: `${plural(shown.length, "map")} over r and lora_alpha; the best value is ${short(best)}.`,
    numbers: () => [["row", "r", "lora_alpha", data.metric.name], used.map(row => [rows[row].name, rank(row), alpha(row), short(rows[row].value[0])])],
  };
}

function overRank(hiddenGroups) {
  const groups = [...grouped("r", row => rank(row) > 0)].filter(([, own]) => new Set(own.map(rank)).size > 1).slice(0, 64);
  if (!groups.length) return null;
  const lines = groups.map(([name, own]) => [name, own.sort((a, b) => rank(a) - rank(b))]);
  const ranks = [...new Set(lines.flatMap(([, own]) => own.map(rank)))].sort((a, b) => a - b);
  const traces = lines.flatMap(([name, own], place) => hiddenGroups.has(name) ? [] : [{
    type: "scatter", mode: "lines+markers", x: own.map(rank), y: own.map(row => rows[row].value[0]), hovertemplate: HOVER,
    customdata: own.map(row => `${about(row)}<br>${safe(data.metric.name)}: ${short(rows[row].value[0])}`),
    error_y: { type: "data", array: own.map(row => known(rows[row].value[2]) ? rows[row].value[2] - rows[row].value[0] : 0), thickness: 1, width: 3 },
    line: { color: data.looks[place].colour, dash: dash(data.looks[place]), width: 2 }, marker: { symbol: data.looks[place].symbol, size: 8 },
  }]);
  return {
    traces, legend: lines.length > 1 ? lines.map(([name], place) => [name, data.looks[place], name]) : null,
    layout: layout("r (rank of the adapter)", data.metric.label, { xaxis: { type: "log", tickvals: ranks, ticktext: ranks.map(String) } }),
    label: `${data.metric.name} over r, ${plural(lines.length, "line")}.`,
    numbers: () => [["other settings", "r", data.metric.name], lines.flatMap(([name, own]) => own.map(row => [name, rank(row), short(rows[row].value[0])]))],
  };
}

function makeFigures() {
  const parent = $("#figures .grid");
  const later = name => () => made[name].redraw();
  const made = {};
  made.tradeoff = new FigureCard(parent, "Cost against quality", "The line joins rows than which no other is better in both (the Pareto front). Rows that are not chosen in the table are grey.", tradeoff, [control("Cost", costs, later("tradeoff"))]);
  const panel = [control("Curve", curveSelect, later("curves")), control("Smoothing", smoothing, later("curves")), control("Seeds", seeds, later("curves")), control("Scale", scale, later("curves"))];
  if (curveNames.length) made.curves = new FigureCard(parent, "Loss curves", "Chosen rows; the mean over seeds, with a band from the lowest to the highest seed.", curves, panel);
  new FigureCard(parent, "Ranked", `Chosen rows, the best on top; bars are 95 % intervals over seeds, the dotted line is the baseline.${rows.some(row => row.ties) ? " Rows that share a letter do not differ significantly." : ""}`, ranked);
  new FigureCard(parent, "Memory by phase", "How much each phase of a run raises the peak memory of the phases before it. A phase below an earlier peak adds nothing.", phases);
  new FigureCard(parent, "Rank and alpha", "A map for each combination of the other swept settings; brighter is better, ★ is the best.", maps);
  new FigureCard(parent, "Over rank", "A line for each combination of the other swept settings.", overRank);
  listeners.push(() => figures.forEach(figure => figure.redraw()));
  let width = window.innerWidth;
  window.addEventListener("resize", () => { if (window.innerWidth !== width) { width = window.innerWidth; figures.forEach(figure => figure.redraw()); } });
}
