/* A report of measures: everything of one matrix, charts by depth, and the columns of the table.
   The address may say more: #matrix=NAME&columns=MEASURE */
document.addEventListener("DOMContentLoaded", () => {
  const { report, layers, rows, table, tip, digits, place, hide } = page;
  const $ = (id) => document.getElementById(id);
  const methods = new Map((report.methods || []).map((m) => [m.name, m]));
  const columns = report.columns || [];

  function element(name, attrs = {}, ...children) {
    const space = "svg g path line rect circle text tspan".split(" ").includes(name) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
    const node = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attrs)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  }
  const number = (layer, c) => {
    const value = (layer.measures || {})[c.key], spread = (layer.spread || {})[c.key];
    const plain = digits(value ?? null) + (spread === undefined ? "" : ` \u00b1 ${digits(spread, 2)}`);
    const doubt = (layer.doubt || {})[c.measure];
    if (doubt === undefined) return plain;
    return element("span", { class: "doubtful", title: doubt }, plain + (value === undefined || value === null ? "" : " ?"));
  };

  /* one matrix: its spectrum in full, and every number with what goes with it */
  const W = 520, H = 330, L = 50, R = 510, T = 14, B = 296;
  const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  function decades(low, high) {
    const found = [];
    for (let k = Math.floor(Math.log10(low)) - 1; k <= Math.log10(high) + 1; k++) for (const m of [1, 2, 5]) found.push(m * 10 ** k);
    const inside = found.filter((v) => v >= low * (1 - 1e-9) && v <= high * (1 + 1e-9));
    const tens = inside.filter((v) => Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-9);
    return tens.length >= 3 ? tens : inside;
  }
  const tick = (v) => v >= 0.001 && v < 1e5 ? String(Number(v.toPrecision(3))) : v.toExponential(0).replace("e+", "e");
  function spectrum(layer) {
    const top = Math.max(layer.spectrum[0], layer.other ? layer.other.spectrum[0] : 0) * 1.3;
    const floor = Math.min(...layer.spectrum.filter((v, k) => v > layer.spectrum[0] * 1e-7 && k < layer.spectrum.length * 0.98), layer.edge || Infinity) / 1.3;
    const last = Math.max(2, layer.spectrum_at[layer.spectrum_at.length - 1]);
    const x = (i) => L + (R - L) * Math.log(i) / Math.log(last);
    const y = (s) => B - (B - T) * Math.min(1, Math.max(0, Math.log(Math.max(s, 1e-300) / floor) / Math.log(top / floor)));
    const svg = element("svg", { class: "plot", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": `Singular values of ${layer.name}` });
    for (const v of decades(floor, top)) {
      svg.append(element("line", { class: "rule", x1: L, x2: R, y1: y(v), y2: y(v) }), element("text", { class: "tick end", x: L - 6, y: y(v) + 3.5 }, tick(v)));
    }
    for (const v of decades(1, last)) svg.append(element("line", { class: "axis", x1: x(v), x2: x(v), y1: B, y2: B + 4 }), element("text", { class: "tick mid", x: x(v), y: B + 16 }, tick(v)));
    svg.append(element("line", { class: "axis", x1: L, x2: R, y1: B, y2: B }), element("text", { class: "tick axis-name end", x: R, y: H - 4 }, "index i of the singular value"));
    if (layer.edge) {
      svg.append(element("rect", { class: "noise", x: L, width: R - L, y: y(layer.edge), height: Math.max(0, B - y(layer.edge)) }));
      svg.append(element("text", { class: "noise-name", x: L + 6, y: y(layer.edge) + 14 }, `noise, up to ${digits(layer.edge, 3)}`));
    }
    const points = (s) => s.spectrum.map((v, k) => [s.spectrum_at[k], v]).filter(([, v]) => v > floor).map(([i, v]) => [x(i), y(v)]);
    if (layer.other) svg.append(element("path", { class: "twin", d: path(points(layer.other)) }));
    svg.append(element("path", { class: "main", d: path(points(layer)) }));
    if (layer.outliers) layer.spectrum.forEach((v, k) => { if (layer.spectrum_at[k] <= layer.outliers) svg.append(element("circle", { class: "spike", cx: x(layer.spectrum_at[k]), cy: y(v), r: 2.6 })); });
    if (layer.tail) svg.append(element("path", { class: "tail", d: path(layer.tail.map(([i, s]) => [x(i), y(s)])) }));
    const keys = [["main", report.other ? report.model.name : "singular values"]];
    if (layer.other) keys.push(["twin", report.other.name]);
    if (layer.tail) keys.push(["tail", "fitted power law"]);
    if (layer.outliers) keys.push(["spike", `${layer.outliers} above the noise`]);
    const legend = element("p", { class: "legend" }, ...keys.map(([kind, text]) => {
      const mark = kind === "spike" ? element("circle", { class: kind, cx: 11, cy: 5, r: 2.6 }) : element("path", { class: kind, d: "M0 5L22 5" });
      return element("span", { class: "key" }, element("svg", { class: "plot swatch", viewBox: "0 0 22 10", width: 22, height: 10, "aria-hidden": "true" }, mark), text);
    }));
    return element("div", { class: "one-plot" }, svg, legend);
  }
  function spark(values) {
    const known = values.filter((v) => v !== null), low = Math.min(...known), high = Math.max(...known);
    const points = values.map((v, i) => [2 + 116 * i / Math.max(1, values.length - 1), v === null ? null : 20 - 18 * (high > low ? (v - low) / (high - low) : 0.5)]);
    return element("svg", { class: "plot spark", viewBox: "0 0 120 22", width: 120, height: 22, role: "img", "aria-label": `${values.length} values from ${digits(low)} to ${digits(high)}` },
      element("path", { class: "main", d: path(points.filter(([, v]) => v !== null)) }));
  }
  function card(layer, name) {
    const m = methods.get(name), mine = columns.filter((c) => c.measure === name && (layer.measures || {})[c.key] !== undefined);
    const lists = Object.entries(layer.lists || {}).filter(([key]) => key === name || key.startsWith(`${name}.`));
    const doubt = (layer.doubt || {})[name], note = doubt ?? (layer.remarks || {})[name];
    if (!mine.length && !lists.length && doubt === undefined) return null;
    const part = (key) => key === name ? "" : key.slice(name.length + 1).replaceAll("_", " ");
    const title = m ? m.title : name, alone = mine.length === 1 && !lists.length && mine[0].key === name;
    const entries = [
      ...mine.map((c) => element("div", {}, element("dt", alone ? { class: "alone" } : {}, alone ? title : part(c.key) || "value"), element("dd", {}, number(layer, c), c.unit ? ` ${c.unit}` : ""))),
      ...lists.map(([key, values]) => element("div", {}, element("dt", {}, part(key) || "values"), element("dd", {}, spark(values)))),
    ];
    return element("div", { class: "one-card" }, ...(alone ? [] : [element("h4", {}, title)]), element("dl", {}, ...entries),
      ...(note ? [element("p", { class: doubt === undefined ? "sub" : "sub worse" }, doubt === undefined ? note : `Not valid: ${note}`)] : []));
  }
  const body = $("one-body");
  let now = -1;
  function show(index) {
    const layer = layers[index];
    if (!layer || !body || index === now) return;
    now = index;
    $("one-name").value = String(index);
    const where = `${layer.role}${layer.block >= 0 ? `, block ${layer.block}` : ""}, ${layer.shape[0]} \u00d7 ${layer.shape[1]}`;
    const cards = [...new Set(columns.map((c) => c.measure).concat([...methods.keys()]))].map((name) => card(layer, name)).filter(Boolean);
    const plot = layer.spectrum && layer.spectrum[0] > 0 ? spectrum(layer) : element("p", { class: "note" }, layer.reason || "No spectrum was measured.");
    let room = 400; // pixels beside the plot; the other cards go below
    const beside = cards.filter((c) => (room -= 14 + 30 * c.querySelectorAll("h4").length + 30 * c.querySelectorAll("dt").length + 40 * c.querySelectorAll("p").length) > 0);
    const head = element("div", { class: "one-head" }, element("h3", { id: "one-title", tabindex: "-1" }, layer.name), element("p", { class: "sub" }, where));
    if (layer.reason) head.append(element("p", { class: "sub worse" }, layer.reason));
    body.replaceChildren(head, plot, element("div", { class: "one-side" }, ...beside), element("div", { class: "one-cards" }, ...cards.filter((c) => !beside.includes(c))));
    for (const row of rows) row.classList.toggle("here", row === rows[index]);
  }
  page.open = (index) => {
    show(index);
    hide();
    $("one").scrollIntoView({ block: "start" });
    $("one-title").focus({ preventScroll: true });
  };
  if (body && layers.length) {
    show(Math.max(0, layers.findIndex((l) => l.tail && l.spectrum)));
    $("one-name").addEventListener("change", (event) => show(Number(event.target.value)));
    table.tBodies[0].addEventListener("click", (event) => { const row = event.target.closest("tr[data-l]"); if (row) page.open(Number(row.dataset.l)); });
  }

  /* the table: the main numbers, every number, or all of one measure with what goes with it */
  const fixed = 3;
  const own = table ? [...table.tHead.rows[0].cells].slice(fixed).filter((th) => !th.dataset.k.startsWith("measure:")) : [];
  function choose(name) {
    const picked = columns.filter((c) => name === "*" || (name ? c.measure === name : c.main));
    if (!picked.length) return;
    const words = name && name !== "*";
    const head = (key, title, kind) => element("th", { scope: "col", "data-k": key, ...(kind ? { class: kind } : {}) }, element("button", { type: "button" }, title));
    const line = table.tHead.rows[0];
    for (const th of [...line.cells].slice(fixed)) th.remove();
    line.append(...picked.map((c) => head(`measure:${c.key}`, c.title, "num")), ...(words ? [element("th", { scope: "col" }, "Remark")] : []), ...own);
    rows.forEach((row, i) => {
      const cells = [...row.cells].slice(fixed), kept = cells.slice(cells.length - own.length);
      for (const td of cells) td.remove();
      const remark = words ? [element("td", { class: "sub" }, (layers[i].doubt || {})[name] ?? (layers[i].remarks || {})[name] ?? "")] : [];
      row.append(...picked.map((c) => element("td", { class: "num" }, number(layers[i], c))), ...remark, ...kept);
    });
    $("columns").value = name;
  }
  if ($("columns")) $("columns").addEventListener("change", (event) => choose(event.target.value));

  /* charts by depth: the nearest point speaks, arrows walk along a line and from line to line */
  for (const svg of document.querySelectorAll('svg[data-nav="depth"]')) {
    const traces = [...svg.querySelectorAll("[data-t]")].map((g) => {
      const [d, k] = g.dataset.t.split(",").map(Number), chart = report.depth[d], trace = chart.traces[k];
      const line = g.querySelector("path"), along = line ? line.getAttribute("d").match(/-?[\d.]+/g).map(Number) : [];
      const dots = [...g.querySelectorAll("circle")].map((c) => [Number(c.getAttribute("cx")), Number(c.getAttribute("cy"))]);
      const known = trace.points.filter((p) => p.value !== null), good = known.filter((p) => p.doubt === undefined);
      const places = dots.length === known.length ? dots : good.map((_, i) => [along[2 * i], along[2 * i + 1]]);
      return (dots.length === known.length ? known : good).map((p, i) => ({ p, g, chart, trace, x: places[i][0], y: places[i][1] }));
    }).filter((t) => t.length);
    if (!traces.length) continue;
    const spot = element("circle", { class: "spot off", r: 4.4 });
    svg.append(spot);
    svg.setAttribute("tabindex", "0");
    let at = [0, 0];
    function point(k, i, client) {
      at = [k, i];
      const { p, g, chart, trace, x, y } = traces[k][i];
      spot.setAttribute("class", "spot");
      spot.setAttribute("cx", x);
      spot.setAttribute("cy", y);
      for (const other of svg.querySelectorAll("[data-t]")) other.classList.toggle("pale", traces.length > 1 && other !== g);
      const where = p.block >= 0 ? `block ${p.block}` : "before the first block";
      const text = `${chart.title} ${digits(p.value)}${p.spread === undefined ? "" : ` \u00b1 ${digits(p.spread, 2)}`}${chart.unit ? ` ${chart.unit}` : ""}`;
      tip.replaceChildren(element("b", {}, chart.traces.length > 1 ? `${trace.name}, ${where}` : where), `\n${text}${p.doubt ? `\nnot valid: ${p.doubt}` : ""}`);
      const on = new DOMPoint(x, y).matrixTransform(svg.getScreenCTM());
      place(client ? client.clientX : on.x, client ? client.clientY : on.y);
    }
    function leave() {
      spot.setAttribute("class", "spot off");
      for (const g of svg.querySelectorAll(".pale")) g.classList.remove("pale");
      hide();
    }
    svg.addEventListener("pointermove", (event) => {
      const to = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = null, gap = 40;
      traces.forEach((t, k) => t.forEach((m, i) => { const far = Math.hypot(m.x - to.x, m.y - to.y); if (far < gap) { gap = far; best = [k, i]; } }));
      if (best) point(...best, event); else leave();
    });
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("focus", () => point(...at));
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (!move) return;
      const k = Math.min(traces.length - 1, Math.max(0, at[0] + move[0]));
      point(k, Math.min(traces[k].length - 1, Math.max(0, at[1] + move[1])));
      event.preventDefault();
    });
  }

  /* other spectra: the nearest line says whose it is; arrows go from module to module */
  for (const svg of document.querySelectorAll('svg[data-nav="profile"]')) {
    const lines = [...svg.querySelectorAll("[data-p]")].filter((g) => g.querySelector("path").getAttribute("d"));
    let at = 0;
    function speak(node, x, y) {
      const [i, k] = node.dataset.p.split(",").map(Number), profile = report.profiles[i], line = profile.lines[k];
      at = lines.indexOf(node);
      page.mark(node);
      const first = `${profile.title}: from ${digits(line.values[0])} (i = ${line.at[0]}) to ${digits(line.values[line.values.length - 1])} (i = ${line.at[line.at.length - 1]})`;
      tip.replaceChildren(element("b", {}, line.module || report.model.name), `\n${first}`);
      place(x, y);
    }
    svg.setAttribute("tabindex", "0");
    svg.addEventListener("pointermove", (event) => {
      const to = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      let best = null, gap = 22;
      for (const node of lines) { const far = Math.abs(to.y - page.height(node, to.x)); if (far < gap) { gap = far; best = node; } }
      if (best) speak(best, event.clientX, event.clientY); else hide();
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("blur", hide);
    function focus(i) {
      const box = svg.getBoundingClientRect();
      speak(lines[i], box.left + 40, box.top + 40);
    }
    svg.addEventListener("focus", () => focus(at));
    svg.addEventListener("keydown", (event) => {
      const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!move) return;
      focus(Math.min(lines.length - 1, Math.max(0, at + move)));
      event.preventDefault();
    });
  }

  function obey() {
    const asked = page.asked();
    if (asked.get("columns") !== null && $("columns")) choose(asked.get("columns"));
    const index = layers.findIndex((l) => l.name === asked.get("matrix"));
    if (index >= 0) show(index);
  }
  addEventListener("hashchange", obey);
  obey();
});
