"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById("tip");

  // What a mark says, beside the pointer or the mark that has the focus.
  function show(value, x, y) {
    tip.replaceChildren(...Object.entries(value).map(([name, words]) => {
      const row = document.createElement("div");
      for (const text of [name, words]) row.appendChild(document.createElement("span")).textContent = text;
      return row;
    }));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(x + 14, innerWidth - box.width - 8))}px`;
    tip.style.top = `${y + box.height + 26 > innerHeight ? Math.max(8, y - box.height - 14) : y + 14}px`;
  }
  const hide = () => { tip.hidden = true; };
  const pointed = (_, event, item, value) => (value ? show(value, event.clientX, event.clientY) : hide());
  addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  addEventListener("scroll", hide, { passive: true });

  // One tab stop for each plot; the arrow keys go to the nearest mark in their direction.
  const marksOf = (plot) => all('[role="graphics-symbol"]', plot).filter((mark) => mark.__data__ && mark.__data__.tooltip);
  function reachable(plot) {
    marksOf(plot).forEach((mark, place) => mark.setAttribute("tabindex", place ? "-1" : "0"));
  }
  const middle = (mark) => { const box = mark.getBoundingClientRect(); return [box.x + box.width / 2, box.y + box.height / 2]; };
  const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  function next(plot, mark, [right, down]) {
    const [x, y] = middle(mark);
    let best = null, least = Infinity;
    for (const other of marksOf(plot)) {
      const [dx, dy] = middle(other).map((place, axis) => place - [x, y][axis]);
      const along = dx * right + dy * down, across = Math.abs(dx * down) + Math.abs(dy * right);
      if (other !== mark && along > 0.5 && along + 3 * across < least) [best, least] = [other, along + 3 * across];
    }
    return best;
  }
  function keys(plot) {
    plot.addEventListener("focusin", (event) => {
      const value = event.target.__data__ && event.target.__data__.tooltip;
      if (value) show(value, ...middle(event.target));
    });
    plot.addEventListener("focusout", hide);
    plot.addEventListener("keydown", (event) => {
      if (!ways[event.key] ) return;
      event.preventDefault();
      const mark = next(plot, event.target, ways[event.key]);
      if (!mark) return;
      event.target.setAttribute("tabindex", "-1");
      mark.setAttribute("tabindex", "0");
      mark.focus();
    });
  }

  const views = new Map();
  const how = { mode: "vega", renderer: "svg", actions: false, defaultStyle: false, ast: true, tooltip: pointed };
  async function draw(plot, spec) {
    if (!views.has(plot)) keys(plot);
    views.set(plot, null);
    const result = await vegaEmbed(plot, spec, how);
    views.set(plot, result.view);
    reachable(plot);
  }
  const filled = (spec, name, rows) => ({ ...spec, data: spec.data.map((one) => (one.name === name ? { ...one, values: rows } : one)) });
  const isSeen = (plot) => plot.offsetParent !== null;
  const drawSeen = () => Promise.all(all(".plot[data-chart]").filter((plot) => isSeen(plot) && !views.has(plot))
    .filter((plot) => data.charts[plot.dataset.chart]).map((plot) => draw(plot, data.charts[plot.dataset.chart])));

  // Panels and what unfolds are drawn when they are first seen.
  for (const choice of all("[data-panels]")) {
    choice.addEventListener("change", (event) => {
      for (const panel of all(".panel", choice.parentElement)) panel.hidden = panel.dataset.panel !== event.target.value;
      drawSeen();
    });
  }
  all("details").forEach((one) => one.addEventListener("toggle", drawSeen));
  addEventListener("beforeprint", () => {
    all(".panel").forEach((panel) => { panel.hidden = false; });
    drawSeen();
  });
  addEventListener("afterprint", () => {
    for (const choice of all("[data-panels]")) find("input:checked", choice).dispatchEvent(new Event("change", { bubbles: true }));
  });

  // Sorting: rows without a value stay at the end.
  for (const table of all("table.sortable")) {
    const heads = all("thead th", table);
    heads.forEach((head, place) => find("button", head).addEventListener("click", () => {
      const falling = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const key = (row) => row.cells[place].dataset.key;
      const compare = (one, other) => (Number.isNaN(Number(one)) || Number.isNaN(Number(other)) ? one.localeCompare(other) : one - other);
      const rows = [...table.tBodies[0].rows].sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
        return (falling ? -1 : 1) * compare(a, b);
      });
      table.tBodies[0].append(...rows);
      find("#sorted").textContent = `sorted by ${find("button", head).textContent}, ${falling ? "descending" : "ascending"}`;
    }));
  }

  const options = (select, names) => select.replaceChildren(...names.map((name) => new Option(name, name)));

  function heatmaps() {
    const field = find("#field"), subject = find("#subject"), table = find("#where-table table");
    const chosen = () => data.fields[field.value];
    function tabulate(rows) {
      const kinds = [...new Set(rows.map((row) => row.kind))];
      const line = (tag, cells) => {
        const made = document.createElement("tr");
        cells.forEach((words, place) => {
          const cell = made.appendChild(document.createElement(place ? tag : "th"));
          if (!place || tag === "th") cell.scope = tag === "th" ? "col" : "row";
          if (place) cell.className = "number";
          cell.textContent = words;
        });
        return made;
      };
      const at = Object.fromEntries(rows.map((row) => [`${row.block} ${row.kind}`, row.is]));
      const head = document.createElement("thead"), body = document.createElement("tbody");
      head.append(line("th", ["block", ...kinds]));
      body.append(...[...new Set(rows.map((row) => row.block))].map((block) => line("td", [block, ...kinds.map((kind) => at[`${block} ${kind}`] || "–")])));
      table.replaceChildren(head, body);
    }
    function update() {
      const { spec, title, subjects } = chosen();
      const rows = subjects[subject.value].map(([block, kind, value, is]) => ({ block, kind, value, is, words: `block ${block}, ${kind}: ${title} ${is}` }));
      find("#where-caption").textContent = `${title} by block: ${subject.value}`;
      tabulate(rows);
      return draw(find("#heatmap"), filled(spec, "cells", rows));
    }
    function change() {
      const before = subject.value, names = Object.keys(chosen().subjects);
      options(subject, names);
      if (names.includes(before)) subject.value = before;
      return update();
    }
    field.addEventListener("change", change);
    subject.addEventListener("change", update);
    return change();
  }

  function spectra() {
    const run = find("#spectra-run"), group = find("#spectra-group"), plot = find("#spectra .plot");
    const details = find("#spectra-details"), spec = data.charts.spectrum;
    delete data.charts.spectrum;
    function update() {
      const curves = data.spectra[run.value][group.value];
      const rows = Object.entries(curves).flatMap(([method, curve]) => curve.map((lost, place) => ({ method, rank: place / (curve.length - 1), lost })));
      find("#spectra figcaption").textContent = `Energy lost by rank: ${group.value}`;
      if (details.open) draw(plot, filled(spec, "curves", rows));
    }
    function change() {
      options(group, Object.keys(data.spectra[run.value]));
      update();
    }
    run.addEventListener("change", change);
    group.addEventListener("change", update);
    details.addEventListener("toggle", update);
    change();
  }

  for (const button of all(".copy")) {
    button.addEventListener("click", async () => {
      const code = find("code", button.parentElement);
      getSelection().selectAllChildren(code);
      try { await navigator.clipboard.writeText(code.textContent); } catch { document.execCommand("copy"); }
      button.textContent = "Copied";
    });
  }

  const theme = find("#theme"), dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (document.documentElement.dataset.theme ? document.documentElement.dataset.theme === "dark" : dark.matches);
  const label = () => theme.setAttribute("aria-label", isDark() ? "Light colours" : "Dark colours");
  theme.addEventListener("click", () => { document.documentElement.dataset.theme = isDark() ? "light" : "dark"; label(); });
  label();

  Promise.all([drawSeen(), data.fields && heatmaps(), data.spectra && spectra()]).then(() => { document.body.dataset.drawn = "yes"; });
})();
