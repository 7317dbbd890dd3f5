"use strict";
/* Theme, tooltips, keyboard, the map's measure, sorting and filtering. Nothing here fetches; names only ever enter as textContent.
   The address may say what to show: report.html#theme=dark&measure=error&sort=error:desc&filter=query */
window.addEventListener("error", (event) => {
  document.documentElement.setAttribute("data-error", event.message);
});

const page = {
  theme(name) {
    if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
  },
  stored() {
    try { return localStorage.getItem("eckart-theme"); } catch { return null; } // file:// may forbid storage
  },
  store(name) {
    try { localStorage.setItem("eckart-theme", name); } catch { /* the choice then lasts as long as the page */ }
  },
  asked() {
    const hash = location.hash.slice(1);
    return new URLSearchParams(hash.includes("=") ? hash : "");
  },
};
page.theme(page.stored());
page.theme(page.asked().get("theme"));

document.addEventListener("DOMContentLoaded", () => {
  const $ = (id) => document.getElementById(id);
  const report = JSON.parse($("report-data").textContent);
  const maps = JSON.parse($("map-data").textContent);
  const layers = report.layers;
  const tip = $("tip");

  /* numbers */
  const digits = (v, n = 4) => v === null || v === undefined ? "\u2013"
    : v === 0 ? "0" : Math.abs(v) >= 1e-4 && Math.abs(v) < 1e6 ? Number(v.toPrecision(n)).toLocaleString("en", { maximumSignificantDigits: n })
    : v.toExponential(n - 2).replace("e+", "e");
  const percent = (v) => `${(100 * v).toFixed(1)}%`;

  /* a number with its error, and why it is no result where it is none */
  function estimate(layer, c) {
    const value = (layer.measures || {})[c.key], doubt = (layer.doubt || {})[c.measure];
    if (value === undefined || value === null) return [];
    const spread = (layer.spread || {})[c.key];
    const text = `${c.title} ${digits(value)}${spread === undefined ? "" : ` \u00b1 ${digits(spread, 2)}`}${c.unit ? ` ${c.unit}` : ""}`;
    return [doubt === undefined ? text : `${text}, not valid: ${doubt}`];
  }

  /* what a matrix says about itself */
  function describe(layer) {
    const [m, n] = layer.shape;
    const lines = [`${layer.role}${layer.block >= 0 ? `, block ${layer.block}` : ""}, ${m} \u00d7 ${n}`];
    if (layer.state === "factored") lines.push(`rank ${layer.rank} of ${Math.min(m, n)}, ${percent(layer.params_after / layer.params_before)} of its parameters`);
    else if (report.kind !== "inspect" || layer.reason) lines.push((layer.state === "dense" ? "left dense" : layer.state) + (layer.reason ? `: ${layer.reason}` : ""));
    if (typeof layer.error === "number") lines.push(`relative loss ${digits(layer.error)}`);
    if (typeof layer.energy === "number") lines.push(`energy kept ${percent(layer.energy)}`);
    if (report.columns) {
      for (const c of report.columns) if (c.main || shown && shown.key === `measure:${c.key}`) lines.push(...estimate(layer, c));
    } else for (const [name, value] of Object.entries(layer.measures || {})) if (value !== null) lines.push(`${name.replaceAll("_", " ")} ${digits(value)}`);
    if (layer.certificate) lines.push(`certificate ${layer.certificate.kind}`);
    return lines;
  }
  function say(indices, extra) {
    tip.replaceChildren();
    const head = document.createElement("b");
    const first = layers[indices[0]];
    head.textContent = indices.length === 1 ? first.name : `${indices.length} matrices: ${first.role}${first.block >= 0 ? `, block ${first.block}` : ""}`;
    let lines = indices.length === 1 ? describe(first) : [];
    if (indices.length > 1) {
      const ranks = indices.map((i) => layers[i].rank).filter((r) => r !== null).sort((a, b) => a - b);
      if (ranks.length) lines.push(`ranks ${ranks[0]} to ${ranks[ranks.length - 1]}`);
      const errors = indices.map((i) => layers[i].error).filter((e) => typeof e === "number");
      if (errors.length) lines.push(`relative loss ${digits(Math.min(...errors))} to ${digits(Math.max(...errors))}`);
    }
    if (extra) lines = [extra, ...lines];
    tip.append(head, "\n" + lines.join("\n"));
    return `${head.textContent}. ${lines.join(". ")}`;
  }
  function place(x, y) {
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(8, x + 14), innerWidth - box.width - 8);
    const below = y + 18 + box.height < innerHeight;
    tip.style.transform = `translate(${Math.round(left)}px, ${Math.round(below ? y + 18 : Math.max(8, y - box.height - 12))}px)`;
    tip.classList.add("on");
  }
  function placeAt(node) {
    const box = (node.querySelector(".cut") || node).getBoundingClientRect();
    place(box.left + Math.min(box.width, 40) / 2, box.top + Math.min(box.height, 40));
  }
  let marked = null;
  function mark(node) {
    if (marked === node) return;
    if (marked) {
      marked.classList.remove("on");
      marked.closest("svg").classList.remove("busy");
    }
    marked = node;
    if (node) {
      node.classList.add("on");
      if (node.classList.contains("ln")) node.closest("svg").classList.add("busy");
    }
  }
  function hide() { mark(null); tip.classList.remove("on"); }
  const members = (node) => node.dataset.l.split(",").map(Number);

  /* the polyline of a spectrum, read back from the drawing once */
  const lines = new WeakMap();
  function points(node) {
    if (!lines.has(node)) {
      const all = [];
      for (const p of node.querySelectorAll("path")) {
        const v = p.getAttribute("d").match(/-?[\d.]+/g).map(Number);
        for (let i = 0; i < v.length; i += 2) all.push([v[i], v[i + 1]]);
      }
      lines.set(node, all.sort((a, b) => a[0] - b[0]));
    }
    return lines.get(node);
  }
  function height(node, x) {
    const all = points(node);
    let i = all.findIndex((p) => p[0] >= x);
    if (i < 0) return x - all[all.length - 1][0] < 12 ? all[all.length - 1][1] : NaN;
    if (i === 0) return all[0][0] - x < 12 ? all[0][1] : NaN;
    const [[a, b], [c, d]] = [all[i - 1], all[i]];
    return c > a ? b + (d - b) * (x - a) / (c - a) : b;
  }
  function nearest(svg, event) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, gap = 22;
    for (const node of svg.querySelectorAll("[data-l]")) {
      const d = node.tagName === "circle"
        ? Math.hypot(at.x - node.getAttribute("cx"), at.y - node.getAttribute("cy"))
        : Math.abs(at.y - height(node, at.x));
      if (d < gap) { gap = d; best = node; }
    }
    return best;
  }

  /* pointer and keyboard on the drawings: one tab stop each, arrows inside, Enter goes to the row of the table */
  for (const svg of document.querySelectorAll("svg[data-nav]")) {
    const marks = [...svg.querySelectorAll("[data-l]")];
    if (!marks.length) continue;
    for (const node of marks) node.setAttribute("tabindex", "-1");
    marks[0].setAttribute("tabindex", "0");
    const grid = svg.dataset.nav === "grid";
    const find = (event) => grid ? event.target.closest("[data-l]") : nearest(svg, event);
    svg.addEventListener("pointermove", (event) => {
      const node = find(event);
      if (!node) return hide();
      if (node !== marked) { mark(node); say(members(node), extra(node)); }
      place(event.clientX, event.clientY);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("click", (event) => { const node = find(event); if (node) go(members(node)[0]); });
    svg.addEventListener("focusin", (event) => {
      const node = event.target.closest("[data-l]");
      if (!node) return;
      mark(node);
      node.setAttribute("role", "img");
      node.setAttribute("aria-label", say(members(node), extra(node)));
      placeAt(node);
    });
    svg.addEventListener("focusout", hide);
    svg.addEventListener("keydown", (event) => {
      const node = event.target.closest("[data-l]");
      if (!node) return;
      const to = grid ? step(svg, node, event.key) : marks[marks.indexOf(node) + ({ ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key] || NaN)];
      if (event.key === "Enter") go(members(node)[0]);
      if (event.key === "Home") shift(node, marks[0]);
      else if (event.key === "End") shift(node, marks[marks.length - 1]);
      else if (to) shift(node, to);
      else return;
      event.preventDefault();
    });
  }
  function shift(from, to) {
    from.setAttribute("tabindex", "-1");
    to.setAttribute("tabindex", "0");
    to.focus();
  }
  function step(svg, node, key) {
    const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[key];
    if (!move) return null;
    const rows = 1 + Math.max(...[...svg.querySelectorAll("[data-r]")].map((n) => +n.dataset.r));
    let r = +node.dataset.r + move[0], c = +node.dataset.c + move[1];
    for (; r >= 0 && r < rows && c >= 0 && c < 10000; r += move[0], c += move[1]) {
      const found = svg.querySelector(`[data-r="${r}"][data-c="${c}"]`);
      if (found) return found;
      if (move[1] > 0 && !svg.querySelector(`[data-c="${c}"]`)) return null;
    }
    return null;
  }
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hide(); });
  document.addEventListener("scroll", () => { // a focused mark scrolls itself into view: its words go along
    if (marked && marked === document.activeElement && tip.classList.contains("on")) placeAt(marked);
    else hide();
  }, { passive: true, capture: true });

  /* the map */
  const cells = [...document.querySelectorAll(".heat .cell")];
  let shown = maps.find((m) => $("measure") && m.key === $("measure").value) || maps[0];
  function extra(node) {
    if (!node.classList.contains("cell") || members(node).length === 1) return "";
    const k = cells.indexOf(node);
    return shown && shown.labels[k] ? `${shown.title}, mean: ${shown.labels[k]}` : "";
  }
  function paint(key) {
    const map = maps.find((m) => m.key === key);
    if (!map) return;
    shown = map;
    const doubt = new Set(map.doubt);
    cells.forEach((cell, k) => {
      cell.setAttribute("class", `cell ${doubt.has(k) ? "doubt" : map.steps[k] >= 0 ? `h${map.steps[k]}` : cell.dataset.s}`);
      const text = cell.querySelector("text");
      if (text) text.textContent = map.labels[k];
    });
    for (const legend of document.querySelectorAll("[data-key]")) {
      const key = legend.dataset.key;
      legend.hidden = key === "doubt" ? !doubt.size : !cells.some((cell, k) => map.steps[k] < 0 && !doubt.has(k) && cell.dataset.s === key);
    }
    if ($("map-note")) $("map-note").textContent = map.note;
    for (const [id, part] of [["map-title", "title"], ["map-low", "low"], ["map-high", "high"]]) $(id).textContent = map[part];
    if ($("measure")) $("measure").value = key;
  }
  if ($("measure")) $("measure").addEventListener("change", (event) => paint(event.target.value));

  /* the table */
  const values = {
    name: (l) => l.name, block: (l) => l.block, role: (l) => l.role, shape: (l) => l.shape[0] * l.shape[1],
    rank: (l) => l.state === "factored" ? l.rank : null, state: (l) => l.state, before: (l) => l.params_before, after: (l) => l.params_after,
    kept: (l) => l.params_before ? l.params_after / l.params_before : null, error: (l) => l.error ?? null, certificate: (l) => l.certificate ? l.certificate.kind : null,
  };
  const table = $("layer-table");
  const rows = table ? [...table.tBodies[0].rows] : [];
  const words = new Intl.Collator("en", { numeric: true });
  function sort(key, down) {
    const value = key.startsWith("measure:") ? (l) => (l.measures || {})[key.slice(8)] ?? null : values[key];
    if (!value || !table) return;
    const order = layers.map((layer, i) => [value(layer), i]).sort(([a, i], [b, j]) => {
      if (a === null || b === null) return (a === null) - (b === null) || i - j; // without a value: last, both ways
      const c = typeof a === "string" ? words.compare(a, b) : a - b;
      return (down ? -c : c) || i - j;
    });
    table.tBodies[0].append(...order.map(([, i]) => rows[i]));
    for (const th of table.tHead.rows[0].cells) {
      if (th.dataset.k === key) th.setAttribute("aria-sort", down ? "descending" : "ascending");
      else th.removeAttribute("aria-sort");
    }
  }
  if (table) table.tHead.addEventListener("click", (event) => {
    const th = event.target.closest("th");
    if (th) sort(th.dataset.k, th.getAttribute("aria-sort") === "ascending");
  });
  const said = layers.map((l) => `${l.name} ${l.role} ${l.state} ${l.reason || ""}`.toLowerCase());
  function filter(text) {
    const wanted = text.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, i) => {
      row.hidden = !wanted.every((w) => said[i].includes(w));
      count += !row.hidden;
    });
    $("shown").textContent = count === rows.length ? `${count} matrices` : `${count} of ${rows.length} matrices`;
  }
  if ($("filter")) $("filter").addEventListener("input", (event) => filter(event.target.value));
  function go(index) {
    if (page.open) return page.open(index);
    const row = rows[index];
    if (!row) return;
    hide();
    for (const other of rows) other.classList.remove("here");
    row.hidden = false;
    row.classList.add("here");
    row.scrollIntoView({ block: "center" });
    row.focus({ preventScroll: true });
  }

  /* theme, copy, save */
  $("theme").addEventListener("click", () => {
    const now = document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
    const next = now === "dark" ? "light" : "dark";
    page.theme(next);
    page.store(next);
  });
  if ($("copy")) $("copy").addEventListener("click", async () => {
    const text = $("yaml-text").textContent;
    try { await navigator.clipboard.writeText(text); $("copy").textContent = "Copied"; } catch {
      getSelection().selectAllChildren($("yaml-text")); // no clipboard on file://: leave it selected
      $("copy").textContent = "Selected";
    }
  });
  $("download").addEventListener("click", () => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([$("report-data").textContent + "\n"], { type: "application/json" }));
    link.download = "report.json";
    link.click();
    URL.revokeObjectURL(link.href);
  });

  Object.assign(page, { height, mark, report, layers, rows, table, tip, digits, estimate, place, hide, sort }); // for the script of one kind of report
  function obey() {
    const asked = page.asked();
    page.theme(asked.get("theme"));
    if (asked.get("measure")) paint(asked.get("measure"));
    if (asked.get("sort")) { const [key, way] = asked.get("sort").split(":"); sort(key, way === "desc"); }
    if (asked.get("filter") !== null && $("filter")) { $("filter").value = asked.get("filter"); filter(asked.get("filter")); }
  }
  addEventListener("hashchange", obey);
  obey();
  document.documentElement.classList.add("ready");
  document.body.dataset.ready = "1";
});
