// What the page does in the visitor's browser: keep the runs, hear clicks in plots and tables,
// save plots. Everything that is shown comes from the server; this file only carries it.
(() => {
  const RUNS = "mlpmoe-runs"; // localStorage: a list of records, the newest first
  const REMOVED = "mlpmoe-removed"; // sessionStorage: lists that were removed, the latest last
  const MOST_RUNS = 300;
  const PINS = 2;

  const read = (storage, key) => {
    try {
      const found = JSON.parse(storage.getItem(key) ?? "[]");
      return Array.isArray(found) ? found : [];
    } catch {
      return [];
    }
  };

  // A hidden text field of the page: its change is heard by the server.
  const send = (id, value) => {
    const field = document.querySelector(`#${id} textarea, #${id} input`);
    if (!field) return false;
    field.value = value;
    field.dispatchEvent(new Event("input"));
    return true;
  };

  const show = () => {
    const removed = read(sessionStorage, REMOVED).length > 0;
    const found = { runs: read(localStorage, RUNS), undo: removed, at: Date.now() };
    return send("runs-stored", JSON.stringify(found));
  };

  const write = (runs) => {
    try {
      localStorage.setItem(RUNS, JSON.stringify(runs.slice(0, MOST_RUNS)));
    } catch {
      console.warn("this browser keeps no runs");
    }
    show();
  };

  // What a run says, beside when and from where: measured before and only looked at again, it
  // keeps its place.
  const figures = (run) => JSON.stringify([run.tokens, run.dense, run.run, run.speed]);

  // Each change works on what is stored at that moment, so that two tabs lose nothing of each other.
  const change = {
    add(text) {
      let runs = read(localStorage, RUNS);
      const removed = read(sessionStorage, REMOVED).flat();
      for (const run of JSON.parse(text || "[]")) {
        // its measurement has gone on after it was removed
        if (removed.some((gone) => gone.id === run.id && gone.when === run.when)) continue;
        const old = runs.find((other) => other.id === run.id);
        // tasks are not measured here: those that came with the run stay with it
        if (old?.run?.tasks && !run.run.tasks) run.run.tasks = old.run.tasks;
        if (old && figures(old) === figures(run)) continue;
        runs = [{ ...run, pinned: old?.pinned ?? false }, ...runs.filter((r) => r !== old)];
      }
      write(runs);
    },
    pin(id) {
      const runs = read(localStorage, RUNS);
      const run = runs.find((other) => other.id === id);
      if (!run) return show();
      run.pinned = run.pinned ? false : Date.now();
      const pinned = runs.filter((r) => r.pinned).sort((a, b) => b.pinned - a.pinned);
      for (const old of pinned.slice(PINS)) old.pinned = false;
      write(runs);
    },
    remove(id) {
      const runs = read(localStorage, RUNS);
      const gone = runs.filter((run) => id === "all" || run.id === id);
      if (!gone.length) return show();
      const removed = [...read(sessionStorage, REMOVED), gone].slice(-20);
      sessionStorage.setItem(REMOVED, JSON.stringify(removed));
      write(runs.filter((run) => !gone.includes(run)));
    },
    undo() {
      const removed = read(sessionStorage, REMOVED);
      const back = removed.pop() ?? [];
      sessionStorage.setItem(REMOVED, JSON.stringify(removed));
      const runs = read(localStorage, RUNS);
      const missing = back.filter((run) => !runs.some((other) => other.id === run.id));
      write([...missing, ...runs].sort((a, b) => (a.when < b.when ? 1 : -1)));
    },
    restore(query) {
      mlpmoe.pushNext();
      send("taken", `${query} ${Date.now()}`); // a second click on the same counts too
    },
  };

  let pressed = null; // what was pressed last in the table of runs
  document.addEventListener("click", (event) => {
    const button = event.target.closest?.("[data-run-action]");
    pressed = button ? { ...button.dataset } : null;
    if (button) change[pressed.runAction](pressed.run);
  });
  // Each change makes the table anew: whoever goes by keyboard is put back to where they were.
  const refocus = () => {
    if (!pressed || document.activeElement !== document.body) return;
    const buttons = [...document.querySelectorAll(`[data-run-action="${pressed.runAction}"]`)];
    const again = buttons.find((button) => button.dataset.run === pressed.run);
    (again ?? document.querySelector("#runs .rows"))?.focus({ preventScroll: true });
  };
  addEventListener("storage", (event) => event.key === RUNS && show());

  // gr.Plot knows no clicks: a point that carries a query string is taken like a row.
  const hear = (plot) => {
    if (plot.heard || !plot.on) return;
    plot.heard = true;
    plot.on("plotly_click", (event) => {
      const query = event.points.map((point) => point.customdata).find(Boolean);
      if (typeof query === "string") change.restore(query);
    });
  };

  // Plots are transparent and grey, to suit light and dark; saved, they stand on white.
  const figureOf = (plot) => ({
    data: plot.data,
    layout: {
      ...plot.layout, paper_bgcolor: "#ffffff", plot_bgcolor: "#ffffff", autosize: false,
      width: plot.clientWidth, height: plot.clientHeight,
      font: { ...plot.layout.font, color: "#444444" },
    },
  });
  const download = (name, url) => {
    const link = Object.assign(document.createElement("a"), { href: url, download: name });
    document.body.append(link);
    link.click();
    link.remove();
  };
  const save = {
    async PNG(plot, name) {
      download(`${name}.png`, await Plotly.toImage(figureOf(plot), { format: "png", scale: 2 }));
    },
    async SVG(plot, name) {
      download(`${name}.svg`, await Plotly.toImage(figureOf(plot), { format: "svg" }));
    },
    async HTML(plot, name) {
      const library = await (await fetch(new URL("plotly.js", location.href.split("?")[0]))).text();
      const figure = JSON.stringify(figureOf(plot)).replaceAll("<", "\\u003c");
      const page = `<!doctype html><html lang="en"><meta charset="utf-8"><title>${name}</title>
<script>${library}<\/script><body><div id="plot"></div>
<script>const figure = ${figure}; Plotly.newPlot("plot", figure.data, figure.layout);<\/script></body></html>`;
      const blob = URL.createObjectURL(new Blob([page], { type: "text/html" }));
      download(`${name}.html`, blob);
      setTimeout(() => URL.revokeObjectURL(blob), 10000);
    },
  };
  const offer = (plot) => {
    const block = plot.closest("[id]:not(.js-plotly-plot)");
    if (!block?.id || block.querySelector(":scope > .save-plot")) return;
    const row = Object.assign(document.createElement("div"), { className: "save-plot" });
    row.append("Save ");
    for (const kind of Object.keys(save)) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: kind });
      button.setAttribute("aria-label", `Save this plot as ${kind}`);
      button.addEventListener("click", () =>
        save[kind](block.querySelector(".js-plotly-plot"), `mlpmoe-${block.id}`),
      );
      row.append(button);
    }
    block.append(row);
  };
  // The label of a text box belongs to the copy button in it, which comes first.
  const name = (field) => {
    const label = field.closest("label");
    if (!label || label.control === field || field.hasAttribute("aria-label")) return;
    const words = label.querySelector("[data-testid='block-info']")?.textContent.trim();
    if (words) field.setAttribute("aria-label", words);
  };
  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      for (const plot of document.querySelectorAll(".js-plotly-plot")) {
        hear(plot);
        offer(plot);
      }
      document.querySelectorAll("label textarea").forEach(name);
      refocus();
    }, 200);
  }).observe(document.documentElement, { childList: true, subtree: true });

  // A budget that the visitor sets, and not the page: in per cent of the dense MLPs' compute.
  const budget = (percent) => send("budget-asked", `${percent} ${Date.now()}`);
  document.addEventListener("input", (event) => {
    if (event.isTrusted && event.target.closest?.("#budget")) budget(event.target.value);
  });

  // An emptied number field is on its way to another number: the server hears of that one, and a
  // field that is left empty shows the last one again.
  const numbers = new WeakMap();
  const isNumber = (field) => field instanceof HTMLInputElement && field.type === "number";
  document.addEventListener("focusin", ({ target }) => {
    if (isNumber(target) && target.value !== "") numbers.set(target, target.value);
  });
  document.addEventListener("input", (event) => {
    if (!isNumber(event.target)) return;
    if (event.target.value === "") event.stopImmediatePropagation();
    else numbers.set(event.target, event.target.value);
  }, true);
  document.addEventListener("focusout", ({ target }) => {
    if (isNumber(target) && target.value === "" && numbers.has(target)) {
      target.value = numbers.get(target);
      target.dispatchEvent(new Event("input", { bubbles: true }));
    }
  }, true);

  window.mlpmoe = { ...change, show, send, drag: (share) => budget(100 * share) };
})();
