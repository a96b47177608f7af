// A tab is told that what it shows has changed, but only while it is open; a closed one is told when
// it is opened. What nobody sees costs the server and the page nothing.
(() => {
  const of = (query, ...names) => names.map((name) => new URLSearchParams(query).get(name));
  const DEPENDS = {
    weights: ({ query, measured, layer }) => [query, measured, layer],
    lesson: ({ query, lesson }) => [...of(query, "model"), lesson],
    tokens: ({ measured }) => [measured],
    runs: ({ query, stored }) => [...of(query, "model", "text"), stored],
    export: ({ query }) => [query],
  };
  let open = null;
  let opened = 0; // how often any tab was

  // keys: of the tabs; before: what each was told last. What each is told now.
  const tell = (keys, first, tab, query, measured, stored, layer, lesson, ...before) => {
    const now = tab || first;
    if (now !== open) [open, opened] = [now, opened + 1];
    const shown = { query, measured, stored, layer, lesson };
    const told = (key, old) =>
      key === now && query ? JSON.stringify([opened, ...DEPENDS[key](shown)]) : old;
    return keys.map((key, number) => told(key, before[number]));
  };

  Object.assign(window.mlpmoe, { tell });
})();
