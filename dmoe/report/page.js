/* The page: choices, legends, tables, sections, printing. Charts are drawn when they become visible. */
const PRINTED_WIDTH = 660;
const figures = [...document.querySelectorAll("figure[data-chart]")];
const hidden = new Map(figures.map((figure) => [figure, new Set()]));
const ready = new Set();
let printing = false;

function selectedKeys(figure, chart) {
  return chart.choices.map((_, position) => {
    const inputs = [...figure.querySelectorAll(`[data-choice="${position}"]`)];
    return (inputs.find((input) => input.type !== "radio" || input.checked) ?? { value: "0" }).value;
  });
}

function selectedOptions(figure, chart) {
  return Object.fromEntries(chart.options.map((name) => {
    const checked = figure.querySelector(`[data-option="${name}"]:checked`);
    return [name, checked.nextElementSibling.textContent];
  }));
}

function legend(figure, chart, view) {
  const list = figure.querySelector(".legend");
  const off = hidden.get(figure);
  const focused = list.contains(document.activeElement) ? document.activeElement.textContent : null;
  list.replaceChildren();
  if (chart.kind !== "curves") return;
  for (const [key, name, picture] of legendItems(view)) {
    const button = element("button", null, { type: "button", "aria-pressed": String(!off.has(key)) });
    button.append(picture(), element("span", name));
    button.addEventListener("click", () => { off.has(key) ? off.delete(key) : off.add(key); draw(figure); });
    const item = element("li");
    item.append(button);
    list.append(item);
    if (focused === name) button.focus();
  }
}

function numbersTable(chart, view) {
  const isCurves = chart.kind === "curves";
  const unit = isCurves ? view.y ?? chart.axes.y : "";
  const head = isCurves ? ["Curve", "First", "Lowest", "Highest", "Last"] : [`${chart.axes.y} / ${chart.axes.x}`, ...view.x.map(String)];
  const rows = isCurves ? view.curves.map(curveSummary) : numbersOf(view).map((row, index) => [String(view.y[index]), ...row.map(formatNumber)]);
  const table = element("table");
  const rounded = view.codes ? `, rounded by at most ${(100 * ((view.high / view.low) ** (1 / 508) - 1)).toFixed(1)}%` : "";
  const title = element("caption");
  title.append(element("span", isCurves ? (unit ? `In ${unit}; the step in brackets` : "The step in brackets") : `In ${chart.axes.count}${rounded}`));
  table.append(title);
  const top = table.createTHead().insertRow();
  for (const name of head) top.append(element("th", name, { scope: "col" }));
  const body = table.createTBody();
  for (const [first, ...cells] of rows) {
    const line = body.insertRow();
    line.append(element("th", first, { scope: "row" }), ...cells.map((cell) => element("td", cell)));
  }
  return table;
}

function curveSummary(curve) {
  const there = curve.y.map((value, index) => [value, curve.x[index]]).filter(([value]) => value !== null);
  const say = ([value, step]) => `${formatNumber(value)} (${step.toLocaleString("en")})`;
  const pick = (better) => there.reduce((best, item) => (better(item[0], best[0]) ? item : best));
  return [curve.name, say(there[0]), say(pick((a, b) => a < b)), say(pick((a, b) => a > b)), say(there[there.length - 1])];
}

function draw(figure) {
  const chart = data.charts[figure.dataset.chart];
  const keys = selectedKeys(figure, chart);
  const view = chart.views[keys.join("|")];
  const [plot, missing, numbers] = [".plot", ".missing", ".numbers"].map((name) => figure.querySelector(name));
  for (const part of [plot, numbers]) part.hidden = !view;
  missing.hidden = Boolean(view);
  if (!view) {
    figure.querySelector(".legend").replaceChildren();
    missing.textContent = `Not recorded: ${keys.map((key, position) => chart.choices[position].options[key]).join(", ")}.`;
    return;
  }
  const width = printing ? PRINTED_WIDTH : plot.clientWidth;
  if (!width) return;
  legend(figure, chart, view);
  (chart.kind === "curves" ? drawCurves : drawMatrix)(figure, chart, view, selectedOptions(figure, chart), hidden.get(figure), width);
  figure.dataset.width = width;
  if (numbers.open) numbers.querySelector(".scroll").replaceChildren(numbersTable(chart, view));
}

/* Called once per chart, when it is first visible. */
function initialize(figure) {
  if (ready.has(figure)) return;
  ready.add(figure);
  const chart = data.charts[figure.dataset.chart];
  Object.keys(chart.views)[0].split("|").forEach((key, position) => {
    const select = figure.querySelector(`select[data-choice="${position}"]`);
    if (select) select.value = key;
  });
  for (const input of figure.querySelectorAll("select, input")) input.addEventListener("change", () => draw(figure));
  figure.querySelector(".numbers").addEventListener("toggle", () => draw(figure));
  new ResizeObserver(() => {
    const width = figure.querySelector(".plot").clientWidth;
    if (!printing && width && Math.abs(Number(figure.dataset.width) - width) > 1) draw(figure);
  }).observe(figure);
  draw(figure);
}

/* Browsers print the page as drawn, so draw it in light colours and as wide as paper, whatever the screen is, with all sections open. */
let closed = [];
function setPrinting(begins) {
  printing = begins;
  document.documentElement.classList.toggle("print", begins);
  if (begins) closed = panels.filter((panel) => !panel.open);
  for (const panel of closed) panel.open = begins;
  figures.forEach(begins ? (figure) => { initialize(figure); draw(figure); } : draw);
}

const panels = [...document.querySelectorAll("details.panel")];
const drawWithin = (part) => part.querySelectorAll("figure[data-chart]").forEach(initialize);
for (const panel of panels) panel.addEventListener("toggle", () => panel.open && drawWithin(panel));

/* A link to a section opens it. */
function openTarget() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (target?.matches("details.panel")) target.open = true;
}
for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", () => (document.getElementById(link.hash.slice(1)).open = true));
addEventListener("hashchange", openTarget);
openTarget();

const openAll = document.getElementById("open-all");
openAll.addEventListener("click", () => {
  const open = panels.some((panel) => !panel.open);
  for (const panel of panels) panel.open = open;
  openAll.textContent = open ? "Close all" : "Open all";
});

dark.addEventListener("change", () => ready.forEach(draw));
addEventListener("beforeprint", () => setPrinting(true));
addEventListener("afterprint", () => setPrinting(false));
drawWithin(document.getElementById("overview"));
for (const panel of panels) if (panel.open) drawWithin(panel);
document.documentElement.dataset.drawn = "all";
