const root = document.documentElement, all = (selector, from = document) => [...from.querySelectorAll(selector)];
const figures = JSON.parse(document.getElementById("figures").textContent);
const plots = all(".plot"), hidden = new Set();

function look() {
  const style = getComputedStyle(root), line = style.getPropertyValue("--line"), text = style.getPropertyValue("--text");
  return { "font.color": text, "hoverlabel.bgcolor": style.getPropertyValue("--card"), "hoverlabel.font.color": text,
    "xaxis.gridcolor": line, "yaxis.gridcolor": line, "xaxis.linecolor": line, "yaxis.linecolor": line };
}
function reveal(plot) {
  if (plot.data) return;
  const { data, layout } = figures[plot.dataset.figure];
  if (matchMedia("(pointer: coarse)").matches) layout.dragmode = false;  // a finger scrolls the page
  Plotly.newPlot(plot, data, layout, { responsive: true, displayModeBar: false });
  Plotly.relayout(plot, look());
  choose(plot);
}
function choose(plot) {
  const grouped = plot.data.map((trace) => trace.meta !== undefined && !plot.closest("[data-group]"));
  if (grouped.some(Boolean)) Plotly.restyle(plot, { visible: plot.data.map((trace, i) => !(grouped[i] && hidden.has(trace.meta))) });
}
function paint(theme) {
  root.dataset.theme = theme;
  plots.filter((plot) => plot.data).forEach((plot) => Plotly.relayout(plot, look()));
}
function refresh() {
  all("#runs input").forEach((box) => hidden[box.checked ? "delete" : "add"](Number(box.value)));
  all("[data-group]").forEach((part) => { part.hidden = hidden.has(Number(part.dataset.group)); });
  plots.filter((plot) => plot.data).forEach(choose);
  all("table").forEach(filter);
}
function filter(table) {
  const words = (table.closest(".card").querySelector("input[type=search]")?.value ?? "").toLowerCase().split(/\s+/);
  all("tbody tr", table).forEach((row) => {
    row.hidden = hidden.has(Number(row.dataset.row)) || !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
}
function sort(head) {
  const down = head.getAttribute("aria-sort") === "ascending", column = head.cellIndex, body = head.closest("table").tBodies[0];
  all("th", head.parentNode).forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.value ?? "", number = (text) => (text === "" ? NaN : Number(text));
  body.append(...all("tr", body).sort((a, b) => {
    const [x, y] = [key(a), key(b)], order = number(x) - number(y);
    if (x === "" || y === "") return (x === "") - (y === "");  // what is unknown comes last either way
    return (Number.isNaN(order) ? x.localeCompare(y, "en", { numeric: true }) : order) * (down ? -1 : 1);
  }));
}

const dark = matchMedia("(prefers-color-scheme: dark)");
paint(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => paint(root.dataset.theme === "dark" ? "light" : "dark"));
all("th button").forEach((button) => button.addEventListener("click", () => sort(button.parentNode)));
all("input[type=search]").forEach((box) => box.addEventListener("input", () => all("table", box.closest(".card")).forEach(filter)));
all("#runs input").forEach((box) => box.addEventListener("change", refresh));
all("[data-all]").forEach((button) => button.addEventListener("click", () => {
  all("#runs input").forEach((box) => { box.checked = button.dataset.all === "1"; });
  refresh();
}));
const watch = new IntersectionObserver((seen) => seen.filter((s) => s.isIntersecting).forEach((s) => reveal(s.target)), { rootMargin: "600px" });
plots.forEach((plot) => watch.observe(plot));
let before;
function widths(width) { plots.forEach((plot) => Plotly.relayout(plot, { width, autosize: !width })); }  // paper is narrow
addEventListener("beforeprint", () => { before = root.dataset.theme; plots.forEach(reveal); paint("light"); widths(320); });
addEventListener("afterprint", () => { paint(before); widths(null); });
