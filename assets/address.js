// The address bar follows the settings: a change replaces it, another tab or a restored run is a
// step that Back undoes. And the settings themselves can be undone and done again.
(() => {
  const SETTLED = 2000; // milliseconds: changes that follow faster are one step
  const ON_THE_WAY = 10000; // at most
  const WRITTEN_IN =
    "input:not([type=range], [type=radio], [type=checkbox]), textarea, [contenteditable=true]";
  const steps = []; // queries
  let at = -1;
  let changed = 0; // when the last step was changed
  let shownTab = null;
  let pushes = false; // whether what comes next is a step of the browser
  let restored = null; // the query, and the tab if it is known, that are being gone back to
  let last = null; // what `address` was asked last

  // What hosts the page in a frame of its own shows this as its address.
  const tell = (search) => {
    if (parent === window) return;
    parent.postMessage({ queryString: search.slice(1), hash: "" }, "https://huggingface.co");
  };

  const remember = (query) => {
    if (query === steps[at]) return;
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

  // The link to what the page shows; tab: its key, first: of the tab that needs no name, trained:
  // what is said of a training, with its result.
  const address = (query, tab, first, trained) => {
    if (!query) return "";
    last = [query, tab, first, trained];
    const search = `?${query}${tab === first ? "" : `&tab=${tab}`}`;
    const [, result] = trained?.match(/ data-result="(\w+)"/) ?? [];
    const link = location.origin + location.pathname + search + (result ? `&result=${result}` : "");
    if (restored && (query !== restored.query || (restored.tab ?? tab) !== tab)) return link; // on the way
    restored = null;
    remember(query);
    const other = search !== location.search;
    if (other || !history.state?.query) { // a link that was opened has no state to go back to
      const further = other && (pushes || (shownTab !== null && shownTab !== tab));
      history[further ? "pushState" : "replaceState"]({ query, tab }, "", search);
      tell(search);
    }
    pushes = false;
    shownTab = tab;
    return link;
  };

  // Until the page shows it, what it shows is on the way and no step of its own.
  const go = (query, tab) => {
    const now = { query, tab };
    restored = now;
    changed = 0;
    setTimeout(() => {
      if (restored !== now) return;
      restored = null;
      if (last) address(...last); // the visitor has gone on meanwhile
    }, ON_THE_WAY);
    mlpmoe.send("taken", `${query}${tab ? `&tab=${tab}` : ""} ${Date.now()}`);
    mark();
  };

  addEventListener("popstate", (event) => {
    if (!event.state?.query) return;
    const { query, tab } = event.state;
    shownTab = tab;
    if (query !== steps[at]) steps.splice(++at, steps.length, query);
    go(query, tab);
  });

  // by: -1 to undo, 1 to do again.
  const step = (by) => {
    const query = steps[at + by];
    if (query === undefined) return;
    at += by;
    go(query);
  };

  addEventListener("keydown", (event) => {
    if (!(event.ctrlKey || event.metaKey) || event.altKey) return;
    if (event.target.closest?.(WRITTEN_IN)) return; // where the browser undoes what was typed
    const by = { z: event.shiftKey ? 1 : -1, y: 1 }[event.key.toLowerCase()];
    if (by) {
      event.preventDefault();
      step(by);
    }
  });

  Object.assign(window.mlpmoe, { address, step, pushNext: () => { pushes = true; } });
})();
