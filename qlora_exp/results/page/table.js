// Helpers, the summary, the table of rows, and the dialog with everything about a row.
// All text from runs goes through textContent, or through safe() where Plotly would take it for HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = selector => document.querySelector(selector);
const rows = data.rows, runs = data.runs.list;
const drawn = new Set();  // rows that the figures draw
const listeners = [];     // called when `drawn`, the order or the filter changes
let sorted = { column: -1, down: false }, order = rows.map((_, index) => index), listed = order;

function el(tag, properties = {}, ...children) {
  const { data: dataset, aria, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  for (const [name, value] of Object.entries(aria ?? {})) element.setAttribute(name === "role" ? name : `aria-${name}`, value);
  element.append(...children.filter(child => child !== null && child !== undefined && child !== ""));
  return element;
}
const safe = text => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
const clip = (text, most) => text.length > most ? `${text.slice(0, most - 1)}…` : text;
const known = value => value !== null && value !== undefined;
const mean = values => values.reduce((sum, value) => sum + value, 0) / values.length;
function short(value) {
  if (!known(value)) return "";
  const size = Math.abs(value);
  if (Number.isInteger(value) || size >= 1e5) return value.toLocaleString("en", { maximumFractionDigits: size >= 1e5 ? 0 : 3 });
  return String(Number(value.toPrecision(size >= 1 ? 5 : 4)));
}
function plural(count, word) { return `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`; }
function wrapped(text, width = 60, lines = 4) {  // for hover labels; the result is safe for Plotly
  const result = [];
  for (const line of String(text).split("\n")) {
    for (let rest = line; rest || rest === line; ) {
      const space = rest.length > width ? rest.lastIndexOf(" ", width) : -1;
      const cut = rest.length <= width ? rest.length : space > width / 2 ? space : width;
      result.push(rest.slice(0, cut));
      rest = rest.slice(cut).trimStart();
      if (!rest || result.length > lines) break;
    }
  }
  const kept = result.slice(0, lines);
  if (result.length > lines) kept[lines - 1] += " …";
  return kept.map(safe).join("<br>");
}

const PATHS = {
  circle: "M15 3a4 4 0 1 0 .01 0z", square: "M11 3h8v8h-8z", diamond: "M15 2l5 5-5 5-5-5z",
  "triangle-up": "M15 2l5 9h-10z", "triangle-down": "M15 12l5-9h-10z", cross: "M13.3 2h3.4v3.3h3.3v3.4h-3.3v3.3h-3.4v-3.3h-3.3v-3.4h3.3z",
  star: "M15 1l1.7 4.2 4.5.3-3.5 2.9 1.2 4.4-3.9-2.5-3.9 2.5 1.2-4.4-3.5-2.9 4.5-.3z", x: "M12 2l3 3 3-3 2 2-3 3 3 3-2 2-3-3-3 3-2-2 3-3-3-3z",
};
function swatch(look) {
  const space = "http://www.w3.org/2000/svg", svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", "0 0 30 14"); svg.setAttribute("class", "swatch"); svg.setAttribute("aria-hidden", "true");
  const line = document.createElementNS(space, "path"), marker = document.createElementNS(space, "path");
  line.setAttribute("d", "M0 7h30"); line.setAttribute("stroke", look.colour); line.setAttribute("stroke-width", "2");
  line.setAttribute("stroke-dasharray", look.dashes.join(" "));
  marker.setAttribute("d", PATHS[look.symbol]); marker.setAttribute("fill", look.colour);
  svg.append(line, marker);
  return svg;
}

function grid(head, body, caption) {
  const cells = (tag, line) => line.map(cell => cell instanceof Node ? el(tag, {}, cell) : el(tag, {}, String(cell ?? "")));
  const lines = body.map(line => el("tr", {}, el("th", { scope: "row" }, line[0] instanceof Node ? line[0] : String(line[0] ?? "")), ...cells("td", line.slice(1))));
  return el("table", {}, caption ? el("caption", {}, caption) : "", el("thead", {}, el("tr", {}, ...cells("th", head).map(cell => Object.assign(cell, { scope: "col" })))), el("tbody", {}, ...lines));
}

function noteBlocks(lines) {  // an indented line belongs to the list of the line before
  const blocks = [];
  for (const line of lines) {
    if (!line.startsWith("  ")) blocks.push(el("p", {}, line));
    else {
      if (blocks.at(-1)?.tagName !== "UL") blocks.push(el("ul"));
      blocks.at(-1).append(el("li", {}, line.trim()));
    }
  }
  return blocks;
}

function showTop() {
  for (const [name, value] of Object.entries(data.about)) $("#about").append(el("div", {}, el("dt", {}, name), el("dd", {}, value)));
  const item = (name, value) => $("#summary").append(el("li", {}, el("span", {}, name), el("strong", {}, value)));
  const sign = data.metric.lower ? 1 : -1;
  const best = order.filter(row => rows[row].value).sort((a, b) => sign * (rows[a].value[0] - rows[b].value[0]))[0];
  item(`best ${data.metric.name}`, `${short(rows[best].value[0])} · ${rows[best].name}`);
  item("baseline", `${short(rows[data.baseline].value[0])} · ${rows[data.baseline].name}`);
  const kinds = ["better", "tie", "worse", "not tested"].map(kind => [kind, rows.filter(row => row.cells.some((cell, place) => isVerdict(place) && cell.startsWith(kind))).length]);
  if (rows.length > 1) item("against the baseline", kinds.filter(([kind, count]) => count || kind !== "not tested").map(([kind, count]) => kind === "tie" ? plural(count, "tie") : `${count} ${kind}`).join(", "));
  const outcomes = new Map();
  for (const run of runs) outcomes.set(run.outcome, (outcomes.get(run.outcome) ?? 0) + 1);
  item(plural(rows.length, "row"), `${plural(runs.length, "run")}: ${[...outcomes].map(([name, count]) => `${count} ${name}`).join(", ")}`);
  const unfair = data.notes.findIndex(line => line.startsWith("The comparison may be unfair"));
  const end = data.notes.findIndex((line, place) => place > unfair && !line.startsWith("  "));
  if (unfair >= 0) $("#warnings").append(el("div", { className: "callout" }, ...noteBlocks(data.notes.slice(unfair, end < 0 ? undefined : end))));
  $("#notes").append(...noteBlocks(data.notes));
  if (data.left_out.length) $("#notes").append(el("p", {}, "To keep this page quick, it does not show everything:"), el("ul", {}, ...data.left_out.map(line => el("li", {}, line))));
  for (const section of document.querySelectorAll("main > section:not([hidden])")) {
    $("nav").append(el("a", { href: `#${section.id}` }, section.querySelector("h2").textContent));
  }
}

// The table
const isVerdict = place => data.headings[place].endsWith("against the baseline");
const places = data.headings.map((_, place) => place);
const columns = [...places.slice(0, data.labels), ...places.filter(isVerdict), ...places.slice(data.labels).filter(place => !isVerdict(place))];
const hidden = new Set();
const texts = rows.map(row => [row.name, ...Object.entries(row.label).map(pair => pair.join("=")), ...row.cells].join("\n").toLowerCase());
const lines = rows.map((row, index) => {
  const box = el("input", { type: "checkbox", aria: { label: `draw ${row.name} in figures` } });
  box.addEventListener("change", () => { box.checked ? drawn.add(index) : drawn.delete(index); changed(); });
  const open = el("button", { type: "button", title: "all settings and metrics" }, row.name);
  open.addEventListener("click", () => showDetails(index));
  const mark = index === data.baseline ? el("small", {}, "(baseline)") : "";
  const cells = columns.map(place => {
    const [text, ...remarks] = isVerdict(place) ? row.cells[place].split("; ") : [row.cells[place]];
    return el("td", { className: cellClass(text, place), data: { place } }, text, remarks.length ? el("small", {}, remarks.join("; ")) : "");
  });
  const kind = index === data.baseline ? "baseline" : row.value ? "" : "failed";
  return el("tr", { className: kind, data: { row: index } }, el("th", { scope: "row", data: { place: -1 } }, el("div", { className: "name" }, box, swatch(data.looks[index]), el("span", {}, open, " ", mark))), ...cells);
});
function cellClass(text, place) {
  if (isVerdict(place)) return `long ${["better", "worse"].find(kind => text.startsWith(kind)) ?? ""}`;
  return data.sorts[place] && place >= data.labels ? "number" : text.length > 60 ? "long" : "";
}
const collator = new Intl.Collator("en", { numeric: true });

function makeTable() {
  const head = [-1, ...columns].map(place => {
    const button = el("button", { type: "button" }, place < 0 ? "row" : data.headings[place]);
    button.addEventListener("click", () => sortBy(place));
    const isNumber = place >= data.labels && data.sorts[place] && !isVerdict(place);
    return el("th", { scope: "col", className: isNumber ? "number" : "", data: { place }, aria: { sort: "none" } }, button);
  });
  $("#table").append(el("caption", { className: "skip" }, "Rows of the comparison"), el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...lines));
  for (const place of columns) {
    const box = el("input", { type: "checkbox", checked: !hidden.has(place) });
    box.addEventListener("change", () => { box.checked ? hidden.delete(place) : hidden.add(place); hideColumns(); });
    $("#columns .panel").append(el("label", {}, box, ` ${data.headings[place]}`));
  }
  hideColumns();
  window.addEventListener("resize", fixWidths);
  $("#filter").addEventListener("input", filterRows);
  document.addEventListener("click", event => { if (!$("#columns").contains(event.target)) $("#columns").open = false; });
  $("#columns").addEventListener("keydown", event => { if (event.key === "Escape") { $("#columns").open = false; $("#columns summary").focus(); } });
  for (const button of document.querySelectorAll("[data-draw]")) button.addEventListener("click", () => { draw(button.dataset.draw); changed(); });
  draw(rows.length <= 16 ? "listed" : "best");
}
function hideColumns() {
  for (const line of [$("#table thead tr"), ...lines]) for (const cell of line.children) cell.hidden = hidden.has(Number(cell.dataset.place));
  fixWidths();
}
function fixWidths() {  // once measured, columns keep their widths: sorting then takes half the time
  const table = $("#table"), head = [...$("#table thead tr").children];
  table.style.tableLayout = table.style.width = "";
  head.forEach(cell => { cell.style.width = ""; });
  const widths = head.map(cell => cell.getBoundingClientRect().width);
  head.forEach((cell, place) => { cell.style.width = `${widths[place]}px`; });
  table.style.width = `${widths.reduce((sum, width) => sum + width, 0)}px`;
  table.style.tableLayout = "fixed";
}
function sortBy(column) {
  sorted = { column, down: sorted.column === column && !sorted.down };
  const values = column < 0 ? null : data.sorts[column], sign = sorted.down ? -1 : 1;
  const text = row => column < 0 ? rows[row].name : rows[row].cells[column];
  const compare = (a, b) => values ? (known(values[a]) && known(values[b]) ? sign * (values[a] - values[b]) : known(values[b]) - known(values[a]))
    : text(a) && text(b) ? sign * collator.compare(text(a), text(b)) : !text(a) - !text(b);  // empty cells come last
  order = order.toSorted(compare);
  for (const cell of $("#table thead tr").children) cell.setAttribute("aria-sort", Number(cell.dataset.place) !== column ? "none" : sorted.down ? "descending" : "ascending");
  filterRows();
}
const AT_ONCE = 30;
function putRows() {  // what is on the screen at once, the rest in the next moments
  const body = $("#table tbody"), rest = listed.map(row => lines[row]), turn = listed;
  body.replaceChildren(...rest.splice(0, AT_ONCE));
  const more = () => {
    if (turn !== listed || !rest.length) return;
    body.append(...rest.splice(0, AT_ONCE));
    setTimeout(more);
  };
  setTimeout(more);
}
function condition(word) {  // r>=8, loss<2.5, or words that a row contains
  const match = /^(.+?)(<=|>=|=|<|>)(.+)$/.exec(word);
  const plain = heading => heading.toLowerCase().replaceAll(" ", "");
  const column = match ? data.headings.findIndex(heading => [plain(heading), plain(heading).split(".").at(-1)].includes(match[1])) : -1;
  const values = data.sorts[column], wanted = Number(match?.[3]);
  if (!values || Number.isNaN(wanted)) return row => texts[row].includes(word);
  const holds = { "<": (a, b) => a < b, ">": (a, b) => a > b, "<=": (a, b) => a <= b, ">=": (a, b) => a >= b, "=": (a, b) => a === b }[match[2]];
  return row => known(values[row]) && holds(values[row], wanted);
}
function filterRows() {
  const conditions = $("#filter").value.toLowerCase().split(/\s+/).filter(Boolean).map(condition);
  listed = order.filter(row => conditions.every(holds => holds(row)));
  putRows();
  changed();
}
const DRAWN = 64;  // so many rows have looks of their own
function draw(which) {
  const sign = data.metric.lower ? 1 : -1;
  const best = rows.map((_, row) => row).filter(row => rows[row].value).sort((a, b) => sign * (rows[a].value[0] - rows[b].value[0]));
  drawn.clear();
  for (const row of { best: [data.baseline, ...best.slice(0, 12)], listed: listed.slice(0, DRAWN), none: [] }[which]) drawn.add(row);
}
let waiting = false;
function changed() {
  lines.forEach((line, row) => { line.querySelector("input").checked = drawn.has(row); });
  $("#count").textContent = `${listed.length} of ${plural(rows.length, "row")}, ${[...drawn].length} in figures`;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => setTimeout(() => { waiting = false; listeners.forEach(listener => listener()); }));
}

// Everything about a row
function showDetails(index) {
  const own = runs.filter(run => run.row === index), row = rows[index];
  const dialog = $("#details"), body = dialog.querySelector(":scope > div");
  $("#details-title").replaceChildren(row.name);
  const head = ["", ...own.map(run => `${run.seed === "" ? "run" : `seed ${run.seed}`}${run.outcome === "ok" ? "" : ` (${run.outcome})`}`)];
  const keys = [...new Set(own.flatMap(run => Object.keys(run.settings)))].sort();
  const tables = [
    ["Configuration", ["", "value"], Object.entries(row.label)],
    ["Runs", head, [["name", ...own.map(run => run.name)], ["run id", ...own.map(run => run.id)], ["outcome", ...own.map(run => run.outcome)], ["failure", ...own.map(run => run.failure)]]],
    ["Metrics", head, data.runs.metrics.map((name, place) => [name, ...own.map(run => short(run.values[place]))])],
    ["Settings that differ between the runs of this comparison", head, keys.map(key => [key, ...own.map(run => run.settings[key] ?? "")])],
    ["Settings that all runs have in common", ["", "value"], Object.entries(data.runs.common).sort()],
  ].map(([title, names, body]) => [title, names, body.filter(line => line.slice(1).some(Boolean))]).filter(([, , body]) => body.length);
  const search = el("input", { type: "search", placeholder: "find a setting or metric", autocomplete: "off", aria: { label: "Find a setting or metric" } });
  const parts = tables.map(([title, names, lines]) => el("section", {}, el("h3", {}, title), el("div", { className: "wide", tabIndex: 0 }, grid(names, lines))));
  search.addEventListener("input", () => {
    for (const line of body.querySelectorAll("tbody tr")) line.hidden = !line.textContent.toLowerCase().includes(search.value.toLowerCase());
    for (const part of parts) part.hidden = !part.querySelector("tbody tr:not([hidden])");
  });
  body.replaceChildren(search, ...parts);
  dialog.showModal();
  dialog.scrollTop = 0;
}
$("#details").addEventListener("click", event => { if (event.target === $("#details")) $("#details").close(); });
