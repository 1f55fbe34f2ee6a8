const root = document.documentElement, all = (selector, from = document) => [...from.querySelectorAll(selector)];
const plots = all(".plot"), hidden = new Set();

function update(view) {
  const style = getComputedStyle(root);
  for (const name of ["ink", "soft", "line"]) view.signal(name, style.getPropertyValue(`--${name}`));
  return view.signal("hidden", [...hidden]).resize().runAsync();
}
async function draw(plot) {
  const renderer = plot.classList.contains("square") ? "canvas" : "svg";  // thousands of cells or points
  const spec = JSON.parse(plot.nextElementSibling.textContent);
  const options = { actions: false, renderer, ast: true, logLevel: 1 };  // the page forbids eval; errors alone
  plot.view = (await vegaEmbed(plot, spec, options)).view;
  plot.addEventListener("pointerdown", touch);
  plot.addEventListener("pointerout", stay, true);
  await update(plot.view);
}
function touch(event) {  // Vega tells values where a pointer moves, and a finger does not
  if (event.pointerType === "touch") event.target.dispatchEvent(new PointerEvent("pointermove", event));
}
function stay(event) {  // what a finger asked for stands when the finger is gone
  if (event.pointerType === "touch") event.stopPropagation();
}
async function updateAll() {
  dispatchEvent(new Event("resize"));  // a chart that was hidden measures its place
  await Promise.all(plots.filter((plot) => plot.view).map((plot) => update(plot.view)));
}
function paint(theme) {
  root.dataset.theme = theme;
  return updateAll();
}
function refresh() {
  all("#runs input").forEach((box) => hidden[box.checked ? "delete" : "add"](Number(box.value)));
  all("[data-group]").forEach((part) => { part.hidden = hidden.has(Number(part.dataset.group)); });
  all(".card table").forEach(filter);
  updateAll();
}
function filter(table) {
  const words = table.closest(".card").querySelector("input[type=search]").value.toLowerCase().split(/\s+/);
  all("tbody tr", table).forEach((row) => {
    row.hidden = hidden.has(Number(row.dataset.row)) || !words.every((word) => row.textContent.toLowerCase().includes(word));
  });
}
function sort(head) {
  const down = head.getAttribute("aria-sort") === "ascending", column = head.cellIndex, body = head.closest("table").tBodies[0];
  all("th", head.parentNode).forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.value;
  body.append(...all("tr", body).sort((a, b) => {
    const [x, y] = [key(a), key(b)], order = Number(x) - Number(y);
    if (x === "" || y === "") return (x === "") - (y === "");  // what is unknown comes last either way
    return (Number.isNaN(order) ? x.localeCompare(y, "en", { numeric: true }) : order) * (down ? -1 : 1);
  }));
}

const dark = matchMedia("(prefers-color-scheme: dark)");
paint(dark.matches ? "dark" : "light");
dark.addEventListener("change", () => paint(dark.matches ? "dark" : "light"));
document.getElementById("theme").addEventListener("click", () => paint(root.dataset.theme === "dark" ? "light" : "dark"));
all("th button").forEach((button) => button.addEventListener("click", () => sort(button.parentNode)));
all("input[type=search]").forEach((box) => box.addEventListener("input", () => filter(box.closest(".card").querySelector("table"))));
all("#runs input").forEach((box) => box.addEventListener("change", refresh));
all("[data-all]").forEach((button) => button.addEventListener("click", () => {
  all("#runs input").forEach((box) => { box.checked = button.dataset.all === "1"; });
  refresh();
}));
let before;
addEventListener("beforeprint", () => { before = root.dataset.theme; paint("light"); });
addEventListener("afterprint", () => paint(before));
addEventListener("scroll", () => all("#vg-tooltip-element").forEach((tip) => tip.classList.remove("visible")));
const drawn = (async () => { for (const plot of plots) await draw(plot); })();
