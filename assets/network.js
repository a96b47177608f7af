// The network: draws what network.py sends and says what is clicked. Gradio runs this with the
// element of the component, `trigger` for its events, and `props.value`, watched by `watch`.
const TICKS = 36; // pixels below the cells: numbers of the layers, the way from input to output
const ROOM = 34; // pixels between two numbers on an axis, at least
const SHADES = 100;
const [section, canvas, grid, row, cell, hover] = [
  ".network", "canvas", ".network-grid", "[role=row]", ".network-cell", ".network-hover",
].map((selector) => element.querySelector(selector));
const [label, legend, reading, spare] = ["label", "legend", "reading", "spare"].map((name) =>
  element.querySelector(`.network-${name}`),
);

let net = null; // what is shown: the value, its columns read
let place = null; // where it is drawn: edges of columns and cells, in pixels of the page
let colours = null; // of the theme
let cursor = { layer: 0, cell: 0 };
let over = null; // the cell under the mouse
let token = null; // the token under the cursor, elsewhere on the page
let masks = null; // per token and layer the cells that it uses; read once needed
let held = null; // the last value with such use: it holds as long as the cells are the same
let word = null; // the layer and the cells that a word of a text runs, elsewhere on the page

const isDense = (column) => column.spared || !column.left.length; // dense: one block, no cells

// Values

const read = (value) => {
  if (!value || !value.columns) return null;
  const columns = JSON.parse(value.columns);
  if (!columns.length) return null;
  if (value.used) held = value;
  const same = held?.columns === value.columns && held.kind === value.kind;
  return {
    ...value, columns, used: same ? held.used : "",
    cells: Math.max(1, ...columns.map((column) => column.left.length)),
  };
};

const percent = (share) => {
  if (share > 0 && share < 0.005) return "under 1 %";
  if (share < 1 && share >= 0.995) return "over 99 %";
  return `${Math.round(100 * share)} %`;
};

const NAMES = { branches: "branch", experts: "expert", neurons: "neurons, group" };
const words = ({ layer, cell }) => {
  const column = net.columns[layer];
  if (column.spared) return `layer ${layer}: spared, it stays dense`;
  if (!column.left.length) return `layer ${layer}: dense`;
  const share = column.left[cell];
  let state;
  if (net.kind === "branches") {
    state = share === 0 ? "gone" : share === 1 ? "nothing lost" : `${percent(share)} left`;
  } else if (cell < column.always) state = "shared, always runs";
  else state = share === 0 ? "runs for no token" : `runs for ${percent(share)} of tokens`;
  return `layer ${layer} · ${NAMES[net.kind]} ${cell}: ${state}`;
};

const uses = (layer, cell) => {
  const column = net.columns[layer];
  if (cell < column.always) return true;
  return ((BigInt(`0x${masks[token][layer] || "0"}`) >> BigInt(cell)) & 1n) === 1n;
};
const tokenWords = () => {
  let [ran, all] = [0, 0];
  net.columns.forEach((column, layer) => {
    if (isDense(column)) return;
    all += column.left.length;
    column.left.forEach((_, cell) => (ran += uses(layer, cell)));
  });
  return `this token runs ${ran.toLocaleString("en")} of ${all.toLocaleString("en")} ${net.kind}`;
};

// Drawing

const scale = (styles, name, steps) => {
  const stops = Array.from({ length: steps }, (_, i) => {
    const hex = styles.getPropertyValue(`--${name}-${i}`).trim();
    return [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
  });
  return Array.from({ length: SHADES + 1 }, (_, shade) => {
    const at = (shade / SHADES) * (steps - 1);
    const low = Math.min(Math.floor(at), steps - 2);
    const mixed = stops[low].map((from, i) =>
      Math.round(from + (at - low) * (stops[low + 1][i] - from)),
    );
    return `rgb(${mixed.join(" ")})`;
  });
};

const look = () => {
  const styles = getComputedStyle(section);
  const value = (name) => styles.getPropertyValue(name).trim();
  colours = {
    damage: scale(styles, "damage", 6),
    load: scale(styles, "load", 5),
    dense: value("--dense"),
    text: value("--body-text-color"),
    quiet: value("--body-text-color-subdued"),
    font: styles.fontFamily,
  };
};

const [BINARY, DECIMAL] = [[1, 2, 4, 8, 16, 32], [1, 2, 5, 10, 20, 50]];
// Numbers for an axis: from 0 on in even steps, and the last.
const ticks = (count, step, steps) => {
  const every = steps.find((n) => n * step >= ROOM) ?? count;
  const found = [];
  for (let n = 0; n < count - 1; n += every) found.push(n);
  if (found.length > 1 && (count - 1 - found.at(-1)) * step < 0.8 * ROOM) found.pop();
  return [...found, count - 1];
};

const arrange = () => {
  const [width, height] = [canvas.clientWidth, canvas.clientHeight];
  const ratio = window.devicePixelRatio || 1;
  const left = 30 + 7 * String(net.cells - 1).length;
  const [x, y, w, h] = [left, 6, width - left - 4, height - TICKS - 6];
  const snap = (v) => Math.round(v * ratio) / ratio;
  const [across, down] = [w / net.columns.length, h / net.cells];
  const gapX = snap(Math.min(10, Math.max(1, 0.16 * across)));
  const gapY = down >= 6 ? 1 : 0;
  place = {
    x, y, w, h, ratio, across, down, width, height,
    // the box of a cell; without one, of the column
    box(layer, cell) {
      const x0 = snap(x + layer * across + gapX / 2);
      const x1 = snap(x + (layer + 1) * across - gapX / 2);
      const column = net.columns[layer];
      const whole = cell === undefined || isDense(column);
      const rows = isDense(column) ? net.cells : column.left.length;
      const y0 = snap(y + (whole ? 0 : cell) * down);
      const y1 = snap(y + (whole ? rows : cell + 1) * down) - gapY;
      return [x0, y0, x1 - x0, y1 - y0];
    },
  };
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  Object.assign(grid.style, { left: `${x}px`, top: `${y}px`, width: `${w}px`, height: `${h}px` });
};

// Diagonal lines, where nothing is left.
const hatch = (brush) => {
  const size = Math.round(5 * place.ratio);
  const tile = Object.assign(document.createElement("canvas"), { width: size, height: size });
  const pen = tile.getContext("2d");
  pen.strokeStyle = colours.damage[SHADES];
  pen.lineWidth = place.ratio;
  for (const shift of [-size, 0, size]) {
    pen.moveTo(shift - 1, size + 1);
    pen.lineTo(shift + size + 1, -1);
  }
  pen.stroke();
  const pattern = brush.createPattern(tile, "repeat");
  pattern.setTransform(new DOMMatrix().scale(1 / place.ratio));
  return pattern;
};

const drawColumn = (brush, column, layer, gone) => {
  if (isDense(column)) {
    brush.fillStyle = colours.dense;
    brush.fillRect(...place.box(layer));
    return;
  }
  const ran = (cell) => (word ? cell < column.always || word.cells.includes(cell) : uses(layer, cell));
  const lit = word ? word.layer === layer : token !== null && masks?.[token];
  if (column.always && net.kind === "experts") {
    const [x, y, w] = place.box(layer, 0);
    const [, end, , h] = place.box(layer, column.always - 1);
    brush.fillStyle = colours.load[SHADES];
    brush.fillRect(x, y, w, end + h - y - (place.down < 6 ? 2 : 0)); // apart from what is chosen
  }
  for (let cell = column.always; cell < column.left.length; cell++) {
    const share = column.left[cell];
    const idle = lit && !ran(cell);
    if (net.kind === "branches") {
      brush.fillStyle = share === 0 ? gone : colours.damage[Math.round(SHADES * (1 - share))];
      brush.globalAlpha = idle ? 0.25 : 1;
    } else {
      const part = lit ? Number(!idle) : share; // of one token it is nothing or all
      brush.fillStyle = colours.load[Math.round(SHADES * part)];
    }
    brush.fillRect(...place.box(layer, cell));
  }
  brush.globalAlpha = 1;
};

const AXIS = { branches: "branch", experts: "expert", neurons: "neurons, busiest first" };
const drawAxes = (brush) => {
  const { x, y, w, h, across, down } = place;
  const write = (text, at, line, align, strong) => {
    brush.font = `${strong ? 600 : 400} 12px ${colours.font}`;
    brush.textAlign = align;
    brush.fillStyle = strong ? colours.text : colours.quiet;
    brush.fillText(text, at, line);
  };
  brush.textBaseline = "middle";
  for (const n of ticks(net.cells, down, BINARY)) write(n, x - 6, y + (n + 0.5) * down, "right");
  for (const n of ticks(net.columns.length, across, DECIMAL)) {
    const apart = Math.abs(n - net.looked) * across;
    if (apart && apart > 20) write(n, x + (n + 0.5) * across, y + h + 10, "center");
  }
  write(net.looked, x + (net.looked + 0.5) * across, y + h + 10, "center", true);
  brush.save();
  brush.translate(8, y + h / 2);
  brush.rotate(-Math.PI / 2);
  write(AXIS[net.kind], 0, 0, "center");
  brush.restore();
  // the way through the model
  const line = y + h + 27;
  write("input", x, line, "left");
  write("layer", x + w / 2, line, "center");
  write("output", x + w, line, "right");
  const [input, half, output] = [["input", 1], ["layer", 0.5], ["output", 1]].map(
    ([word, part]) => part * brush.measureText(word).width + 8,
  );
  const [from, to] = [x + input, x + w - output];
  brush.strokeStyle = brush.fillStyle = colours.quiet;
  brush.beginPath();
  for (const [a, b] of [[from, x + w / 2 - half], [x + w / 2 + half, to]]) {
    brush.moveTo(a, line);
    brush.lineTo(b, line);
  }
  brush.moveTo(to - 5, line - 3);
  brush.lineTo(to, line);
  brush.lineTo(to - 5, line + 3);
  brush.stroke();
};

const draw = () => {
  if (!net || !canvas.clientWidth) return;
  arrange();
  const brush = canvas.getContext("2d");
  brush.setTransform(place.ratio, 0, 0, place.ratio, 0, 0);
  brush.lineWidth = 1;
  const gone = hatch(brush);
  net.columns.forEach((column, layer) => drawColumn(brush, column, layer, gone));
  drawAxes(brush);
  const [bx, by, bw] = place.box(net.looked);
  brush.strokeStyle = colours.text;
  brush.lineWidth = 2;
  brush.strokeRect(bx - 2, by - 2, bw + 4, place.h + 3);
  tell();
};

// What is at the cursor, in words and for the keyboard

const put = (box, [x, y, w, h]) =>
  Object.assign(box.style, { left: `${x}px`, top: `${y}px`, width: `${w}px`, height: `${h}px` });

const setText = (target, text) => {
  if (target.textContent !== text) target.textContent = text;
};

const tell = () => {
  const [x, y, w, h] = place.box(cursor.layer, cursor.cell);
  put(cell, [x - place.x, y - place.y, w, h]);
  row.setAttribute("aria-rowindex", cursor.cell + 1);
  cell.setAttribute("aria-colindex", cursor.layer + 1);
  cell.setAttribute("aria-selected", cursor.layer === net.looked);
  cell.setAttribute("aria-label", words(cursor));
  hover.hidden = !over;
  if (over) put(hover, place.box(over.layer, over.cell));
  const alone = !over && token !== null && masks?.[token];
  setText(reading, alone ? tokenWords() : words(over ?? cursor));
  const spared = net.columns[cursor.layer].spared;
  setText(spare, spared ? `Convert layer ${cursor.layer}` : `Spare layer ${cursor.layer}`);
};

const KEY = {
  branches: [["ramp damage", "lost: 0 %", "100 %"], ["gone", "gone"]],
  experts: [["ramp load", "tokens: 0 %", "100 %"], ["always", "always"]],
  neurons: [["ramp load", "tokens: 0 %", "100 %"]],
};
// The legend: swatches with what stands for them, before and after.
const explain = () => {
  if (legend.dataset.kind === net.kind) return;
  legend.dataset.kind = net.kind;
  legend.replaceChildren(
    ...[...KEY[net.kind], ["spared", "dense"]].map(([name, before, after]) => {
      const [item, swatch] = [document.createElement("span"), document.createElement("i")];
      swatch.className = name;
      item.append(...(after ? [before, swatch, after] : [swatch, before]));
      return item;
    }),
  );
};

const summary = () => {
  const spared = net.columns.flatMap((column, layer) => (column.spared ? [layer] : []));
  const kept = spared.length ? `; kept dense: ${spared.join(", ")}` : "";
  return `${net.columns.length} layers with up to ${net.cells} ${net.kind}${kept}`;
};

const update = () => {
  const before = net;
  net = read(props.value);
  masks = null;
  section.classList.toggle("bare", !net);
  if (!net) return setText(reading, "");
  net.looked = Math.min(Math.max(net.looked, 0), net.columns.length - 1);
  if (net.looked !== before?.looked) cursor = { ...cursor, layer: net.looked };
  cursor = clamp(cursor);
  over = over && clamp(over);
  if (token !== null) readMasks();
  setText(label, net.label);
  explain();
  grid.setAttribute("aria-label", summary());
  grid.setAttribute("aria-rowcount", net.cells);
  grid.setAttribute("aria-colcount", net.columns.length);
  draw();
};

const clamp = ({ layer, cell }) => {
  const last = net.columns.length - 1;
  layer = Math.min(Math.max(layer, 0), last);
  const cells = net.columns[layer].left.length || 1;
  return { layer, cell: Math.min(Math.max(cell, 0), cells - 1) };
};

const readMasks = () => {
  masks ??= net?.used ? JSON.parse(net.used) : [];
};

// Mouse, touch, keyboard

const at = (event) => {
  const box = grid.getBoundingClientRect();
  return clamp({
    layer: Math.floor((event.clientX - box.left) / place.across),
    cell: Math.floor((event.clientY - box.top) / place.down),
  });
};

// The frame moves at once; the rest of the page follows.
const lookAt = () => {
  net.looked = cursor.layer;
  draw();
  trigger("click", {
    action: "look",
    layer: cursor.layer,
    cell: isDense(net.columns[cursor.layer]) ? null : cursor.cell,
  });
};

const spareIt = () => trigger("click", { action: "spare", layer: cursor.layer });

// Texts on the page mark the words that run the cell that is pointed at.
const point = (cell) => document.dispatchEvent(new CustomEvent("mlpmoe:cell", { detail: cell }));

grid.addEventListener("pointermove", (event) => {
  if (!net || event.pointerType === "touch") return;
  over = at(event);
  point(over);
  tell();
});
grid.addEventListener("pointerleave", () => {
  over = null;
  point(null);
  if (net) tell();
});
cell.addEventListener("blur", () => point(null));
grid.addEventListener("click", (event) => {
  if (!net) return;
  cursor = at(event);
  cell.focus({ preventScroll: true });
  lookAt();
});
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
grid.addEventListener("keydown", (event) => {
  if (!net || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = STEPS[event.key];
  if (step) cursor = clamp({ layer: cursor.layer + step[0], cell: cursor.cell + step[1] });
  else if (event.key === "Home") cursor = clamp({ ...cursor, layer: 0 });
  else if (event.key === "End") cursor = clamp({ ...cursor, layer: net.columns.length - 1 });
  else if (event.key === "Enter" || event.key === " ") lookAt();
  else if (event.key === "s") spareIt();
  else return;
  event.preventDefault();
  point(cursor);
  tell();
});
spare.addEventListener("click", spareIt);

document.addEventListener("mlpmoe:token", (event) => {
  if (!element.isConnected) return;
  token = event.detail ?? null;
  if (net && token !== null) readMasks();
  draw();
});

document.addEventListener("mlpmoe:cells", (event) => {
  if (!element.isConnected) return;
  word = event.detail ?? null;
  draw();
});

new ResizeObserver(() => {
  section.classList.toggle("narrow", section.clientWidth < 430);
  draw();
}).observe(section);
const relook = () => {
  look();
  draw();
};
new MutationObserver(relook).observe(document.body, { attributeFilter: ["class"] });
look();
watch("value", update);
update();
