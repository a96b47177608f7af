// Pointing at a word of a routed model shows in the network which experts it ran; pointing at an
// expert there marks the words of a text that ran it.
(() => {
  const tell = (name, detail) => document.dispatchEvent(new CustomEvent(`mlpmoe:${name}`, { detail }));
  let word = null;

  document.addEventListener("pointerover", (event) => {
    const over = event.target.closest?.("[data-token], #words-by-expert [data-cells]") ?? null;
    if (over === word) return;
    word = over;
    tell("cells", null);
    if (!word || word.dataset.token === undefined) tell("token", null);
    if (!word) return;
    if (word.dataset.token !== undefined) return tell("token", Number(word.dataset.token));
    const layer = Number(word.closest("[data-layer]").dataset.layer);
    tell("cells", { layer, cells: word.dataset.cells.split(" ").map(Number) });
  });

  document.addEventListener("mlpmoe:cell", (event) => {
    const { layer, cell } = event.detail ?? {};
    const text = document.querySelector("#words-by-expert [data-layer]");
    if (!text) return;
    const here = event.detail && Number(text.dataset.layer) === layer;
    for (const span of text.children) {
      span.classList.toggle("ran", Boolean(here) && span.dataset.cells.split(" ").includes(String(cell)));
    }
  });
})();
