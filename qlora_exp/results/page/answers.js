// Answers side by side, and the loss of each held-out item in one run against another.
const prompts = data.answers.prompts, answersOf = new Map();  // prompt -> row -> answers of its runs
for (const [place, answers] of Object.entries(data.answers.of_run)) {
  for (const answer of answers) {
    const byRow = answersOf.get(answer.prompt) ?? new Map(), run = runs[place];
    byRow.set(run.row, [...(byRow.get(run.row) ?? []), { ...answer, seed: run.seed }]);
    answersOf.set(answer.prompt, byRow);
  }
}
const scoreNames = [...new Set([...answersOf.values()].flatMap(byRow => [...byRow.values()].flat().flatMap(answer => Object.keys(answer.scores))))];
const CARDS = window.innerWidth < 700 ? 8 : 24;
let current = 0, matching = prompts.map((_, place) => place), most = CARDS;

function marked(text, words) {  // the text with what is searched for marked
  const pattern = words.length ? new RegExp(`(${words.map(word => word.replaceAll(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|")})`, "gi") : null;
  return pattern ? text.split(pattern).map((part, place) => place % 2 ? el("mark", {}, part) : part) : [text];
}
const searched = () => $("#search").value.toLowerCase().split(/\s+/).filter(Boolean);
function block(title, text, className) {
  return el("div", { className }, el("h3", {}, title), el("p", { dir: "auto", className: text ? "text" : "text empty", tabIndex: text.length > 600 ? 0 : -1 }, ...marked(text || "(empty)", searched())));
}
function showAnswers() {
  const [prompt, reference] = prompts[current], byRow = answersOf.get(current) ?? new Map();
  $("#question").replaceChildren(block("Prompt", prompt, ""), block("Reference", reference, "reference"));
  const score = $("#order").value, best = row => mean(byRow.get(row).map(answer => answer.scores[score] ?? -Infinity));
  let shown = listed.filter(row => byRow.has(row));
  if (score) shown = shown.toSorted((a, b) => best(b) - best(a) || 0);
  const cards = shown.slice(0, most).map(row => el("article", { className: "answer" },
    el("h3", {}, swatch(data.looks[row]), rows[row].name, row === data.baseline ? " (baseline)" : ""),
    ...byRow.get(row).flatMap(answer => [
      el("p", { className: "scores" }, answer.seed ? `seed ${answer.seed}` : "", ...Object.entries(answer.scores).flatMap(([name, value], place) => [place || answer.seed ? " · " : "", `${name} `, el("b", {}, short(value) || "not a number")])),
      el("p", { dir: "auto", className: answer.text ? "text" : "text empty", tabIndex: answer.text.length > 600 ? 0 : -1 }, ...marked(answer.text || "(empty answer)", searched()))])));
  if (shown.length > most) {
    const more = el("button", { type: "button" }, `show all ${shown.length} rows`);
    more.addEventListener("click", () => { most = Infinity; showAnswers(); });
    cards.push(more);
  }
  $("#cards").replaceChildren(...cards.length ? cards : [el("p", { className: "hint" }, "No listed row answered this prompt.")]);
  const place = matching.indexOf(current);
  $("#prompt").value = current;
  $("#position").textContent = matching.length ? `${place + 1} of ${matching.length}${matching.length < prompts.length ? ` that match, ${prompts.length} in all` : ""}` : "no prompt matches";
  $("#previous").disabled = place <= 0;
  $("#next").disabled = place < 0 || place === matching.length - 1;
}
function goTo(prompt) {
  if (prompt === undefined) return;
  current = prompt;
  most = CARDS;
  showAnswers();
}
const haystacks = prompts.map((texts, place) => [...texts, ...[...(answersOf.get(place)?.values() ?? [])].flat().map(answer => answer.text)].join("\n").toLowerCase());
function searchPrompts() {
  const words = searched();
  matching = prompts.map((_, place) => place).filter(place => words.every(word => haystacks[place].includes(word)));
  $("#prompt").replaceChildren(...matching.map(place => el("option", { value: place }, `${place + 1}: ${clip(prompts[place][0].replaceAll(/\s+/g, " ").trim(), 110)}`)));
  if (!matching.includes(current) && matching.length) current = matching[0];
  showAnswers();
}
function makeAnswers() {
  if (!prompts.length) return;
  $("#answers").hidden = false;
  $("#order").append(el("option", { value: "" }, "as in the table"), ...scoreNames.map(name => el("option", { value: name }, `best ${name} first`)));
  $("#order").addEventListener("change", showAnswers);
  $("#search").addEventListener("input", searchPrompts);
  $("#prompt").addEventListener("change", () => goTo(Number($("#prompt").value)));
  const step = by => goTo(matching[matching.indexOf(current) + by]);
  $("#previous").addEventListener("click", () => step(-1));
  $("#next").addEventListener("click", () => step(1));
  $("#answers").addEventListener("keydown", event => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || ["INPUT", "SELECT"].includes(event.target.tagName)) return;
    event.preventDefault();
    step(by);
  });
  searchPrompts();
  listeners.push(showAnswers);
}

// Loss per item: of a row (mean over its seeds) or of one run
const measured = Object.keys(data.losses.of_run).map(Number);
function sides() {
  const byRow = Map.groupBy(measured, place => runs[place].row);
  const rowsOf = [...byRow].map(([row, places]) => ({ row, name: rows[row].name, places }));
  const single = rowsOf.filter(side => side.places.length > 1).flatMap(side => side.places.map(place => ({ row: side.row, name: `${side.name}, seed ${runs[place].seed}`, places: [place] })));
  return [...rowsOf, ...single];
}
function lossOf(side, items) {
  const values = side.places.map(place => data.losses.of_run[place]).filter(own => own.items === items).map(own => own.values);
  return values.length ? values[0].map((_, item) => values.every(own => known(own[item])) ? mean(values.map(own => own[item])) : null) : null;
}
function makeLosses() {
  const all = sides();
  if (all.length < 2) return;
  $("#losses").hidden = false;
  for (const id of ["#first", "#second"]) {
    $(id).append(...all.map((side, place) => el("option", { value: place }, side.name)));
    $(id).addEventListener("change", () => card.redraw());
  }
  const base = Math.max(0, all.findIndex(side => side.row === data.baseline));
  const best = all.filter(side => rows[side.row].value && side.row !== data.baseline).sort((a, b) => rows[a.row].value[0] - rows[b.row].value[0])[0];
  $("#first").value = base;
  $("#second").value = best ? all.indexOf(best) : base ? 0 : 1;
  $("#swap").addEventListener("click", () => { [$("#first").value, $("#second").value] = [$("#second").value, $("#first").value]; card.redraw(); });
  const card = new FigureCard($("#losses .grid"), "Item against item", "Below the diagonal, the item's loss is lower in the second (up) than in the first (across).", () => {
    const [a, b] = ["#first", "#second"].map(id => all[$(id).value]);
    const shared = data.losses.tokens.findIndex((_, items) => lossOf(a, items) && lossOf(b, items));
    if (shared < 0) {
      const text = "these two were measured on other held-out items";
      return { traces: [], layout: layout("", "", { height: 160, annotations: [{ text, showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 }] }), label: text, numbers: () => [["item"], []] };
    }
    const [xs, ys] = [lossOf(a, shared), lossOf(b, shared)], tokens = data.losses.tokens[shared], promptOf = data.losses.prompts[shared] ?? {};
    const items = xs.map((_, item) => item).filter(item => known(xs[item]) && known(ys[item]));
    const text = item => promptOf[item] === undefined ? "" : prompts[promptOf[item]][0];
    const trace = (own, colour, symbol) => ({
      type: "scatter", mode: "markers", x: own.map(item => xs[item]), y: own.map(item => ys[item]), ids: own.map(String), hovertemplate: HOVER,
      marker: { color: colour, symbol, size: 7, opacity: 0.75 },
      customdata: own.map(item => `item ${item + 1}, ${plural(tokens[item], "token")}<br>across: ${short(xs[item])}<br>up: ${short(ys[item])} (${ys[item] > xs[item] ? "+" : ""}${short(ys[item] - xs[item])})${text(item) ? `<br>${wrapped(clip(text(item).trim(), 240), 60, 4)}` : ""}`),
    });
    const lower = items.filter(item => ys[item] < xs[item]), rest = items.filter(item => ys[item] >= xs[item]);
    const range = ranged(items.flatMap(item => [xs[item], ys[item]]), 0.04);
    const weight = tokens.filter((_, item) => known(xs[item]) && known(ys[item])).reduce((sum, each) => sum + each, 0);
    const difference = items.reduce((sum, item) => sum + (ys[item] - xs[item]) * tokens[item], 0) / weight;
    const said = `${lower.length} of ${plural(items.length, "item")} have a lower loss in the second; over all tokens the difference is ${difference > 0 ? "+" : ""}${short(difference)} nats per token.`;
    const name = side => `${isNarrow() ? rows[side.row].brief : clip(side.name, 55)}\nloss, nats per token (lower is better)`;
    return {
      traces: [{ type: "scatter", mode: "lines", x: range, y: range, line: { color: "#8795a1", dash: "dot", width: 1 }, hoverinfo: "skip" }, trace(lower, "#0072B2", "circle"), trace(rest, "#D55E00", "triangle-up")],
      layout: layout(name(a), name(b), { height: 520, xaxis: { range }, yaxis: { range }, annotations: [
        { xref: "paper", yref: "paper", x: 0.01, y: 0.99, xanchor: "left", yanchor: "top", showarrow: false, text: `▲ ${rest.length} not lower in the second`, font: { color: "#a84300" } },
        { xref: "paper", yref: "paper", x: 0.99, y: 0.01, xanchor: "right", yanchor: "bottom", showarrow: false, text: `● ${lower.length} lower in the second`, font: { color: "#005a8f" } }] }),
      label: said,
      clicked: point => { const prompt = promptOf[Number(point.id)]; if (prompt !== undefined) { $("#search").value = ""; searchPrompts(); goTo(prompt); $("#answers").scrollIntoView(); } },
      numbers: () => [["item", "tokens", "across", "up", "difference", "prompt"], items.toSorted((i, j) => Math.abs(ys[j] - xs[j]) - Math.abs(ys[i] - xs[i])).map(item => [item + 1, tokens[item], short(xs[item]), short(ys[item]), short(ys[item] - xs[item]), clip(text(item).replaceAll(/\s+/g, " ").trim(), 100)])],
    };
  });
}

makeTable();
makeAnswers();
makeLosses();
showTop();
makeFigures();
changed();
document.documentElement.dataset.ready = "true";
