// The address bar follows the settings: a change replaces it, another tab or a restored run is a
// step that Back undoes. And the settings themselves can be undone and done again.
(() => {
  const SETTLED = 2000; // milliseconds: changes that follow faster are one step
  const steps = []; // queries
  let at = -1;
  let changed = 0; // when the last step was changed
  let shownTab = null;
  let pushes = false; // whether what comes next is a step of the browser
  let restored = null; // the query that is being gone back to

  // What hosts the page in a frame of its own shows this as its address.
  const tell = (search) => {
    if (parent === window) return;
    parent.postMessage({ queryString: search.slice(1), hash: "" }, "https://huggingface.co");
  };

  const remember = (query) => {
    if (query === steps[at]) return;
    if (restored !== null) {
      if (query === restored) restored = null;
      return;
    }
    const now = Date.now();
    if (at > 0 && now - changed < SETTLED) steps[at] = query;
    else steps.splice(++at, steps.length, query);
    changed = now;
    mark();
  };

  const mark = () => {
    const can = { undo: at > 0, redo: at < steps.length - 1 };
    for (const [id, possible] of Object.entries(can)) {
      const button = document.querySelector(`#${id}`);
      if (button) button.setAttribute("aria-disabled", String(!possible));
    }
  };

  // The link to what the page shows; tab: its key, first: of the tab that needs no name.
  const address = (query, tab, first) => {
    if (!query) return "";
    remember(query);
    const search = `?${query}${tab === first ? "" : `&tab=${tab}`}`;
    if (search !== location.search) {
      const steps_on = pushes || (shownTab !== null && shownTab !== tab);
      history[steps_on ? "pushState" : "replaceState"]({ query, tab }, "", search);
      tell(search);
    }
    pushes = false;
    shownTab = tab;
    return location.origin + location.pathname + search;
  };

  const go = (query) => mlpmoe.send("taken", `${query} ${Date.now()}`);

  addEventListener("popstate", (event) => {
    if (!event.state) return;
    const { query, tab } = event.state;
    shownTab = tab;
    restored = query;
    at = Math.max(at, steps.push(query) - 1);
    go(`${query}&tab=${tab}`);
    mark();
  });

  // by: -1 to undo, 1 to do again.
  const step = (by) => {
    const query = steps[at + by];
    if (query === undefined) return;
    at += by;
    changed = 0;
    restored = query;
    setTimeout(() => { if (restored === query) restored = null; }, 5000);
    go(query);
    mark();
  };

  addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
    if (event.target.closest?.("input, textarea, [contenteditable=true]")) return;
    const by = { z: event.shiftKey ? 1 : -1, y: 1 }[event.key.toLowerCase()];
    if (by) {
      event.preventDefault();
      step(by);
    }
  });

  Object.assign(window.mlpmoe, { address, step, pushNext: () => { pushes = true; } });
})();
