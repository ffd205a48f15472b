"use strict";
// Click on the head of a column sorts its table by it, another click the other way round; empty cells stay at the end.
for (const table of document.querySelectorAll("table[data-sortable]")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sortBy(table, heads, head, column));
  });
}

function sortBy(table, heads, head, column) {
  const numeric = head.classList.contains("num");
  const before = head.getAttribute("aria-sort");
  const ascending = before ? before === "descending" : !numeric;
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const body = table.tBodies[0];
  const rows = [...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    if (numeric && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);
    const order = numeric ? Number(x) - Number(y) : x.localeCompare(y, "en");
    return ascending ? order : -order;
  });
  body.append(...rows);
  heads.forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
}
