"use strict";
const tables = [...document.querySelectorAll("table.runs")];
const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });

// A cell's number, or its text; undefined where there is nothing, which is last in both directions.
function valueOf(row, column) {
  const cell = row.cells[column];
  const given = cell.dataset.v ?? cell.textContent.trim();
  if (given === "" || given === "—") return undefined;
  const number = Number(given.replace("\u2212", "-"));
  return Number.isNaN(number) ? given : number;
}

function compare(a, b) {
  if (typeof a === "number" && typeof b === "number") return a - b;
  return collator.compare(String(a), String(b));
}

function sort(table, header) {
  const descending = header.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  header.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [valueOf(row, header.cellIndex), row]);
  keyed.sort(([a], [b]) => {
    if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
    return descending ? compare(b, a) : compare(a, b);
  });
  body.append(...keyed.map(([, row]) => row));
}

for (const table of tables) {
  for (const header of table.tHead.rows[0].cells) {
    header.querySelector("button").addEventListener("click", () => sort(table, header));
  }
}

const filter = document.getElementById("filter");
const state = document.getElementById("state");
const shown = document.getElementById("shown");
const texts = new Map(
  tables.flatMap((table) => [...table.tBodies[0].rows])
    .filter((row) => row.dataset.state)
    .map((row) => [row, row.cells[0].textContent.toLowerCase()]),
);

function select() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const [row, text] of texts) {
    const fits = state.value === "fell" ? "fell" in row.dataset
      : !state.value || row.dataset.state === state.value;
    row.hidden = !(fits && words.every((word) => text.includes(word)));
    if (!row.hidden && row.closest("table") === tables[0]) count += 1;
  }
  shown.textContent = `${count} of ${tables[0].tBodies[0].rows.length} shown`;
}

filter.addEventListener("input", select);
state.addEventListener("change", select);
document.querySelector(".tools").hidden = false;
select();
