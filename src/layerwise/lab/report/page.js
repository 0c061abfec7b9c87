"use strict";
(() => {
  const { config, figures } = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Map(); // experiment -> names of the arms that are switched off
  const views = new Map(); // id -> what is drawn
  let queue = Promise.resolve();

  const rowsOf = data => {
    const { cross, words = {}, ...columns } = data;
    let rows;
    if (cross) {
      rows = [{}];
      for (const [name, values] of Object.entries(cross))
        rows = rows.flatMap(row => values.map(value => ({ ...row, [name]: value })));
    } else rows = Object.values(columns)[0].map(() => ({}));
    for (const [name, values] of Object.entries(columns))
      rows.forEach((row, place) => (row[name] = words[name] ? words[name][values[place]] : values[place]));
    return rows;
  };

  // An exponential mean over the steps of each line.
  const smoothed = (rows, weight) => {
    const last = new Map();
    return rows.map(row => {
      const key = JSON.stringify([row.arm, row.measure, row.seed]), before = last.get(key), made = { ...row };
      if (before)
        for (const name of ["value", "low", "high"])
          if (row[name] !== null) made[name] = weight * before[name] + (1 - weight) * row[name];
      last.set(key, made);
      return made;
    });
  };

  const scaled = (spec, type) => {
    for (const layer of spec.layer) if (layer.encoding.y) layer.encoding.y.scale = type === "log" ? { type, nice: false } : { zero: false, nice: false };
    return spec;
  };

  const draw = async box => {
    const figure = figures[box.id], width = box.clientWidth;
    if (!width) return;
    const chosen = (box.closest(".charts") || box).dataset, off = hidden.get(box.closest("[data-experiment]"));
    let spec = structuredClone(figure.spec), rows = rowsOf(figure.data);
    if (chosen.scale) spec = scaled(spec, chosen.scale);
    if (Number(chosen.smooth)) rows = smoothed(rows, Number(chosen.smooth));
    for (const param of spec.params || []) if (param.name === "hidden" && off) param.value = [...off];
    views.get(box.id)?.finalize();
    const description = `${box.getAttribute("aria-label")}`;
    const whole = { ...spec, width, description, autosize: { type: "fit-x", contains: "padding" }, datasets: { rows } };
    views.set(box.id, await vegaEmbed(box, whole, { ast: true, renderer: "svg", actions: false, logLevel: 1, config }));
    box.dataset.drawn = width;
  };

  const ask = box => (queue = queue.then(() => draw(box)).catch(error => console.error(box.id, error)));
  const sizes = new ResizeObserver(entries => {
    for (const { target } of entries)
      if (target.clientWidth && Math.abs(target.clientWidth - Number(target.dataset.asked || 0)) > 4) {
        target.dataset.asked = target.clientWidth;
        ask(target);
      }
  });
  for (const box of document.querySelectorAll(".plot")) sizes.observe(box);

  const part = (tag, attributes, ...inside) => {
    const made = Object.assign(document.createElement(tag), attributes);
    made.append(...inside);
    return made;
  };

  for (const row of document.querySelectorAll(".charts[data-curves]")) {
    const boxes = [...row.querySelectorAll(".plot")], again = () => boxes.forEach(ask);
    const log = part("input", { type: "checkbox", checked: row.dataset.curves === "log" });
    const below = values => values.some(value => value !== null && value <= 0);
    log.disabled = boxes.some(box => below(figures[box.id].data.value) || below(figures[box.id].data.low));
    log.addEventListener("change", () => { row.dataset.scale = log.checked ? "log" : "linear"; again(); });
    const smooth = part("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: 0 });
    smooth.addEventListener("change", () => { row.dataset.smooth = smooth.value; again(); });
    const hint = part("span", { className: "fine" }, "Shift and wheel zooms, dragging moves, a double click resets.");
    const controls = [part("label", {}, log, " logarithmic"), part("label", {}, "smoothing ", smooth), hint];
    row.querySelector(".grid").before(part("div", { className: "controls" }, ...controls));
  }

  for (const button of document.querySelectorAll(".legend button"))
    button.addEventListener("click", () => {
      const whole = button.closest("[data-experiment]"), off = hidden.get(whole) || new Set();
      hidden.set(whole, off);
      const arm = button.dataset.arm;
      if (!off.delete(arm)) off.add(arm);
      for (const other of whole.querySelectorAll(".legend button"))
        if (other.dataset.arm === arm) other.setAttribute("aria-pressed", String(!off.has(arm)));
      for (const box of whole.querySelectorAll(".plot")) {
        const takes = (figures[box.id].spec.params || []).some(param => param.name === "hidden");
        if (takes && views.has(box.id)) views.get(box.id).view.signal("hidden", [...off]).runAsync();
      }
    });

  const number = text => parseFloat(text.replace(/−/g, "-").replace(/,/g, ""));
  for (const table of document.querySelectorAll("table.sorts"))
    [...table.tHead.rows[0].cells].forEach((head, place) => {
      const button = part("button", { type: "button" }, ...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        for (const body of table.tBodies) {
          const text = row => row.cells[place]?.textContent.trim() ?? "";
          const compare = (a, b) => {
            const [one, two] = [number(text(a)), number(text(b))];
            if (isNaN(one) || isNaN(two)) return isNaN(one) - isNaN(two) || text(a).localeCompare(text(b));
            return one - two;
          };
          body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * compare(a, b)));
        }
      });
    });
})();
