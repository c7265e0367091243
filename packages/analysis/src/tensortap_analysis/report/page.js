"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const read = (id) => JSON.parse(byId(id).textContent);

  // Charts in the page's own colours, light or dark.
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const axis = { gridcolor: of("--line"), linecolor: of("--line"), zerolinecolor: of("--line") };
    const layout = {
      "modebar.bgcolor": "rgba(0,0,0,0)", "modebar.color": of("--quiet"),
      "modebar.activecolor": of("--accent"),
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", "font.color": of("--ink"),
      "font.family": getComputedStyle(document.body).fontFamily, "font.size": 12,
      "hoverlabel.bgcolor": of("--panel"), "hoverlabel.font.color": of("--ink"),
      "hoverlabel.align": "left",
    };
    for (const which of ["xaxis", "yaxis"])
      for (const key in axis) layout[`${which}.${key}`] = axis[key];
    return layout;
  };
  const config = {
    responsive: true, displaylogo: false, plotlyServerURL: "",
    // Named one by one: plotly's own choice has a button that uploads the chart.
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d"]],
  };
  const charts = [...document.querySelectorAll(".chart")];
  const draw = async (chart) => {
    const drawn = read(`${chart.id}-data`);
    await Plotly.newPlot(chart, drawn.data, drawn.layout, config);
    await Plotly.relayout(chart, colours());
  };
  Promise.all(charts.map(draw)).then(() => document.body.setAttribute("data-ready", ""));
  dark.addEventListener("change", () => charts.forEach((chart) => Plotly.relayout(chart, colours())));

  // The table of tensors. Text of a run only ever becomes textContent.
  const table = byId("tensors-table");
  if (!table) return;
  const { columns, rows, beyond } = read("tensors-data");
  const PAGE = 200;
  const number = (value) =>
    typeof value === "number" ? value : value === "inf" ? Infinity : value === "-inf" ? -Infinity : NaN;
  const numeric = columns.map((_, at) => rows.some((row) => typeof row[at] === "number"));
  const words = rows.map((row) => row.filter((cell) => typeof cell === "string").join(" ").toLowerCase());
  const every = rows.map((_, at) => at);
  const state = { sort: null, down: true, limit: PAGE };

  const format = (value) => {
    if (value === null) return "–";
    if (typeof value !== "number") return value;
    if (Number.isInteger(value) && Math.abs(value) < 1e15) return value.toLocaleString("en");
    const size = Math.abs(value);
    return size >= 1e-3 && size < 1e5 ? String(Number(value.toPrecision(4))) : value.toExponential(2);
  };

  const matches = (at) => {
    const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const only = byId("beyond");
    if (only && only.checked && !(number(rows[at][beyond]) >= 1)) return false;
    return wanted.every((word) =>
      word.length > 1 && word[0] === "-" ? !words[at].includes(word.slice(1)) : words[at].includes(word));
  };

  // What is not known goes last, whichever way.
  const order = (one, two) => {
    const [a, b] = [rows[one][state.sort], rows[two][state.sort]];
    if (a === null || b === null) return (a === null) - (b === null) || one - two;
    const apart = numeric[state.sort] ? number(a) - number(b) || 0
      : a.localeCompare(b, "en", { numeric: true });
    return (state.down ? -apart : apart) || one - two;
  };

  const line = (at) => {
    const row = document.createElement("tr");
    if (beyond !== null && number(rows[at][beyond]) >= 1) row.className = "beyond";
    rows[at].forEach((value, column) => {
      const cell = row.insertCell();
      cell.textContent = format(value);
      if (numeric[column]) cell.className = "number";
    });
    return row;
  };

  const show = () => {
    const found = every.filter(matches);
    if (state.sort !== null) found.sort(order);
    const shown = found.slice(0, state.limit);
    table.tBodies[0].replaceChildren(...shown.map(line));
    byId("shown").textContent =
      `${shown.length.toLocaleString("en")} of ${found.length.toLocaleString("en")} shown`;
    byId("more").hidden = found.length <= state.limit;
    [...table.tHead.rows[0].cells].forEach((cell, at) =>
      cell.setAttribute("aria-sort", at !== state.sort ? "none" : state.down ? "descending" : "ascending"));
  };

  const sortBy = (at) => {
    state.down = state.sort === at ? !state.down : numeric[at];
    state.sort = at;
    show();
  };
  const again = () => { state.limit = PAGE; show(); };

  const head = table.tHead.insertRow();
  columns.forEach(({ title, says }, at) => {
    const cell = document.createElement("th");
    const button = document.createElement("button");
    cell.scope = "col";
    cell.title = says;
    if (numeric[at]) cell.className = "number";
    button.type = "button";
    button.textContent = title;
    button.addEventListener("click", () => sortBy(at));
    cell.append(button);
    head.append(cell);
  });
  byId("search").addEventListener("input", again);
  if (byId("beyond")) byId("beyond").addEventListener("change", again);
  byId("more").addEventListener("click", () => { state.limit += 5 * PAGE; show(); });
  show();
})();
