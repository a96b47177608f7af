// Dragging on a plot of cost: while somebody presses on it and moves sideways, `mlpmoe.drag(share, done)`
// hears at which share of the dense cost they are, several times a second and once at the end. A plot
// takes part if a block around it has data-drag="on" or the class drag-on; who goes by keyboard has
// the slider. Presses that do not move stay clicks on points.
(() => {
  const EVERY = 100; // milliseconds between two calls, at least
  const MOVED = 8; // pixels; plotly too takes less for a click
  const BLOCK = '[data-drag="on"], .drag-on';

  let held = null; // since a press: the block, where it was, whether it moves, and what was last told

  // The plot of a block may be replaced while one drags, so it is looked up each time.
  const shareAt = (block, clientX) => {
    const plot = block.querySelector(".js-plotly-plot");
    const axis = plot?._fullLayout?.xaxis;
    if (!axis) return null;
    const box = plot.getBoundingClientRect();
    const scale = box.width / plot.offsetWidth || 1; // a page that is zoomed by CSS
    const value = axis.p2c((clientX - box.left) / scale - axis._offset); // per cent of dense
    return Math.min(1, Math.max(0, value / 100));
  };
  const inside = (block, event) => {
    const plot = block.querySelector(".js-plotly-plot");
    const size = plot?._fullLayout?._size;
    if (!size) return false;
    const box = plot.getBoundingClientRect();
    const scale = box.width / plot.offsetWidth || 1;
    const [x, y] = [(event.clientX - box.left) / scale, (event.clientY - box.top) / scale];
    return x >= size.l && x <= size.l + size.w && y >= size.t && y <= size.t + size.h;
  };
  const tell = (done) => {
    clearTimeout(held.timer);
    held.timer = null;
    held.told = Date.now();
    const share = shareAt(held.block, held.x);
    if (share !== null) window.mlpmoe?.drag?.(share, done);
  };
  const end = (event, done) => {
    if (!held || event.pointerId !== held.pointer) return;
    const { moves, block } = held;
    clearTimeout(held.timer);
    if (moves) {
      held.x = done ? event.clientX : held.x;
      tell(true);
      block.classList.remove("dragging");
    }
    held = null;
  };

  document.addEventListener("pointerdown", (event) => {
    if (held || !event.isPrimary || event.button !== 0) return;
    const block = event.target.closest?.(BLOCK);
    if (!block || !inside(block, event)) return;
    held = {
      block, pointer: event.pointerId, startX: event.clientX, startY: event.clientY, x: event.clientX,
      moves: false, told: 0, timer: null,
    };
  }, true);
  document.addEventListener("pointermove", (event) => {
    if (!held || event.pointerId !== held.pointer) return;
    held.x = event.clientX;
    if (!held.moves) {
      const [across, down] = [Math.abs(held.x - held.startX), Math.abs(event.clientY - held.startY)];
      const finger = event.pointerType === "touch";
      if (finger && down >= MOVED && down > across) return void (held = null); // it scrolls
      if (across < MOVED) return;
      held.moves = true;
      held.block.classList.add("dragging");
    }
    const wait = held.told + EVERY - Date.now();
    if (wait <= 0) tell(false);
    else held.timer ??= setTimeout(() => held && tell(false), wait);
  }, true);
  document.addEventListener("pointerup", (event) => end(event, true), true);
  document.addEventListener("pointercancel", (event) => end(event, false), true);
})();
