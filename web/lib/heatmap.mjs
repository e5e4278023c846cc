// The ranks of a LoRA as a heat map: blocks from top to bottom in the order the network runs
// them, q, k, v and out of self- and of cross-attention from left to right, all else in strips
// below. Colour is the rank's logarithm, and the same as in the report's picture.
import { gradient, NOWHERE } from "./colours.mjs";
import { Surface, theme } from "./surface.mjs";
import { Tip } from "./tip.mjs";
import { bytes, number, t } from "./text.mjs";

const COLUMNS = ["attn1", "attn2"].flatMap((kind) =>
  ["q", "k", "v", "out"].map((layer) => `${kind}.${layer}`),
);
const FONT = "system-ui, -apple-system, 'Segoe UI', sans-serif";
const [LEFT, HEADING, LEGEND, BAND_GAP, GROUP_GAP] = [58, 32, 22, 8, 3];
const [GRID_HEIGHT, LEAST_ROW, MOST_ROW] = [300, 4, 14]; // of all rows; of one
const [STRIP_LABEL, STRIP_CELL] = [18, 12];
export class HeatMap {
  constructor(host, { label, testid = "lora2-heatmap" }) {
    this.label = label;
    this.components = [];
    this.cells = [];
    this.chosen = -1; // the cell under the pointer or the keyboard
    this.surface = new Surface(host, {
      height: 24,
      testid,
      draw: (...args) => this.draw(...args),
    });
    this.canvas = this.surface.canvas;
    this.tip = new Tip(host);
    prepare(this);
    this.set([]);
  }

  /** Show these: [{module, label, row, column, rank, max_rank, nu, bytes, kind}]. */
  set(components) {
    const same =
      components.length === this.components.length &&
      components.every(({ module }, index) => module === this.components[index].module);
    this.components = components.map((component) => ({ ...component }));
    if (same) {
      // News of the same layers: whoever reads one of them goes on reading.
      this.scale = NOWHERE;
      this.widen();
      if (this.tip.shown) this.tell(false);
      this.surface.request();
      return;
    }
    this.chosen = -1;
    this.tip.hide();
    this.scale = NOWHERE;
    this.cells = []; // of other components; laid out anew when it is drawn
    this.plan = plan(this.components);
    this.widen();
    this.width = 0; // the cells are laid out anew
    this.canvas.dataset.cells = "0";
    this.surface.request();
  }

  /** New ranks in the order of the components; bytes follow by proportion. */
  update(ranks) {
    if (ranks.length !== this.components.length) return false;
    ranks.forEach((rank, index) => {
      const one = this.components[index];
      if (one.bytes && one.rank > 0) one.bytes = (one.bytes * rank) / one.rank;
      one.rank = rank;
    });
    this.widen();
    if (this.chosen >= 0 && this.tip.shown) this.tell(false);
    this.surface.request();
    return true;
  }

  /** Let the scale reach every rank; it never shrinks, or colours would change their meaning. */
  widen() {
    this.scale = this.scale.reaching(this.components.map(({ rank }) => rank));
  }

  destroy() {
    this.tip.destroy();
    this.surface.destroy();
  }

  // --- drawing ---------------------------------------------------------------------------------

  draw(context, width, height, scale) {
    const colours = theme();
    if (!this.components.length) {
      write(context, t("heatmap_empty"), 0, 15, 11, colours.faint);
      return;
    }
    if (width !== this.width) this.lay(width);
    if (height !== this.height) {
      this.surface.setHeight(this.height);
      this.surface.paint();
      return;
    }
    const snap = (value) => Math.round(value * scale) / scale;
    for (const cell of this.cells) {
      const rank = this.components[cell.index].rank;
      context.fillStyle = rank < 1 ? colours.line : this.scale.colour(rank);
      const [left, top] = [snap(cell.x), snap(cell.y)];
      context.fillRect(left, top, snap(cell.x + cell.w) - left, snap(cell.y + cell.h) - top);
    }
    this.write(context, colours);
    this.drawLegend(context, width, colours);
    if (this.chosen >= 0) outline(context, this.cells[this.chosen], colours);
    this.canvas.dataset.cells = String(this.cells.length);
  }

  write(context, colours) {
    for (const { text, x, y, size, align, strong } of this.labels) {
      write(context, text, x, y, size, strong ? colours.text : colours.faint, align);
    }
  }

  drawLegend(context, width, colours) {
    const { highest, uniform } = this.scale;
    if (!highest) return; // nothing has a rank
    const [bar, y] = [uniform ? 12 : 96, this.height - 12];
    const end = uniform ? t("rank", { rank: highest }) : String(highest);
    context.font = `10px ${FONT}`;
    const left = width - context.measureText(end).width - 6 - bar;
    write(context, end, width, y + 8, 10, colours.faint, "right");
    if (!uniform) {
      write(context, "1", left - 6, y + 8, 10, colours.faint, "right");
      const before = left - 12 - context.measureText("1").width;
      write(context, t("rank_scale"), before, y + 8, 10, colours.faint, "right");
    }
    context.save();
    context.translate(left, 0);
    if (uniform) context.fillStyle = this.scale.colour(highest);
    else context.fillStyle = this.bar ??= gradient(context, bar);
    context.fillRect(0, y, bar, 8);
    context.restore();
  }

  /** Where every cell and label goes at this width. */
  lay(width) {
    this.width = width;
    this.cells = [];
    this.labels = [];
    let bottom = 0;
    if (this.plan.rows.length) bottom = layGrid(this, width);
    bottom = layStrips(this, width, bottom);
    this.cells.forEach((cell, index) => (cell.place = index));
    this.height = bottom + LEGEND;
  }

  // --- choosing a cell -------------------------------------------------------------------------

  at(event) {
    const box = this.canvas.getBoundingClientRect();
    const zoom = box.width / this.canvas.offsetWidth || 1;
    const [x, y] = [(event.clientX - box.left) / zoom, (event.clientY - box.top) / zoom];
    return this.cells.findIndex(
      (c) => x >= c.x - 1 && x < c.x + c.w + 1 && y >= c.y && y < c.y + c.h + 1,
    );
  }

  choose(place, aloud) {
    if (place !== this.chosen) this.surface.request();
    this.chosen = place;
    if (place < 0) this.tip.hide();
    else this.tell(aloud);
  }

  tell(aloud) {
    const cell = this.cells[this.chosen];
    const one = this.components[cell.index];
    const facts = [
      one.max_rank
        ? t("rank_of", { rank: one.rank, most: one.max_rank })
        : one.kind || t("rank", { rank: one.rank }), // a kind where there is no rank
    ];
    if (one.nu !== null && one.nu !== undefined) facts.push(`ν ${number(one.nu, 3)}`);
    if (one.bytes) facts.push(bytes(one.bytes));
    const box = this.canvas.getBoundingClientRect();
    const zoom = box.width / this.canvas.offsetWidth || 1;
    const spot = {
      left: box.left + cell.x * zoom,
      right: box.left + (cell.x + cell.w) * zoom,
      top: box.top + cell.y * zoom,
      bottom: box.top + (cell.y + cell.h) * zoom,
    };
    this.tip.show(one.label || `${one.row} · ${one.column}`, facts.join(" · "), one.module, spot);
    if (aloud) this.tip.say(`${one.module}: ${facts.join(", ")}`);
  }

  /** The next cell in a direction, by its middle; the same where there is none. */
  beside(key) {
    const from = this.cells[this.chosen];
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
    let [best, least] = [this.chosen, Infinity];
    for (const cell of this.cells) {
      const x = cell.x + cell.w / 2 - from.x - from.w / 2;
      const y = cell.y + cell.h / 2 - from.y - from.h / 2;
      const along = dx * x + dy * y;
      if (along < 1) continue;
      const across = Math.abs(dx ? y : x);
      const far = along + across * 20;
      if (far < least) [best, least] = [cell.place, far];
    }
    return best;
  }
}

/** Attention by block, the rest by kind: indices into the components, in their order. */
function plan(components) {
  const [rows, kinds] = [new Map(), new Map()];
  components.forEach(({ row, column }, index) => {
    const grid = COLUMNS.includes(column);
    const into = grid ? rows : kinds;
    if (!into.has(row)) into.set(row, []);
    into.get(row).push({ index, column: COLUMNS.indexOf(column) });
  });
  return { rows: [...rows], kinds: [...kinds] };
}

/** The group of a block: "down 4.1" of "down 4.1 · 0". */
function groupOf(row) {
  return row.split(" · ")[0];
}

function layGrid(map, width) {
  const { rows } = map.plan;
  const used = [0, 4].filter((band) =>
    rows.some(([, found]) => found.some(({ column }) => column >= band && column < band + 4)),
  );
  const across = (width - LEFT - BAND_GAP * (used.length - 1)) / (4 * used.length);
  const high = Math.max(LEAST_ROW, Math.min(MOST_ROW, Math.floor(GRID_HEIGHT / rows.length)));
  const left = (column) => {
    const band = used.indexOf(column < 4 ? 0 : 4);
    return LEFT + band * (4 * across + BAND_GAP) + (column % 4) * across;
  };
  for (const band of used) {
    const middle = (from, columns) => left(from) + (columns * across - 1) / 2;
    const name = t(band ? "cross_attention" : "self_attention");
    map.labels.push({ text: name, x: middle(band, 4), y: 11, size: 11, align: "center", strong: true });
    for (let layer = 0; layer < 4; layer += 1) {
      const text = COLUMNS[layer].split(".")[1];
      map.labels.push({ text, x: middle(band + layer, 1), y: 26, size: 10, align: "center" });
    }
  }
  let [y, group] = [HEADING, null];
  let last = -Infinity; // the baseline of the label above
  for (const [row, found] of rows) {
    const name = groupOf(row);
    if (name !== group && group !== null) y += GROUP_GAP;
    if (name !== group && y + 8 - last >= 10) {
      last = y + Math.min(high, 12) / 2 + 4;
      map.labels.push({ text: name, x: 0, y: last, size: 10 });
    }
    group = name;
    for (const { index, column } of found) {
      map.cells.push({ index, x: left(column), y, w: across - 1, h: high - (high > 5 ? 1 : 0.5) });
    }
    y += high;
  }
  return y;
}

function layStrips(map, width, top) {
  let y = top ? top + 6 : 0;
  const many = map.plan.kinds.reduce((sum, [, found]) => sum + found.length, 0) > 200;
  const size = many ? STRIP_CELL / 2 : STRIP_CELL;
  const across = Math.max(1, Math.floor((width - LEFT) / size));
  for (const [kind, found] of map.plan.kinds) {
    const text = `${kind} · ${found.length}`;
    map.labels.push({ text, x: LEFT, y: y + 12, size: 10 });
    y += STRIP_LABEL;
    found.forEach(({ index }, place) => {
      const [x, down] = [LEFT + (place % across) * size, Math.floor(place / across) * size];
      map.cells.push({ index, x, y: y + down, w: size - 1, h: size - 1 });
    });
    y += Math.ceil(found.length / across) * size + 4;
  }
  return y;
}

function write(context, text, x, y, size, colour, align = "left") {
  context.font = `${size}px ${FONT}`;
  context.fillStyle = colour;
  context.textAlign = align;
  context.fillText(text, x, y);
}

function outline(context, cell, colours) {
  context.lineWidth = 3;
  context.strokeStyle = colours.surface;
  context.strokeRect(cell.x - 0.5, cell.y - 0.5, cell.w + 1, cell.h + 1);
  context.lineWidth = 1.5;
  context.strokeStyle = colours.text;
  context.strokeRect(cell.x - 0.5, cell.y - 0.5, cell.w + 1, cell.h + 1);
}

function prepare(map) {
  const { canvas } = map;
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", map.label);
  const leave = () => document.activeElement !== canvas && map.choose(-1);
  canvas.addEventListener("pointerenter", () => map.surface.sharpen());
  canvas.addEventListener("pointermove", (event) => {
    const place = map.at(event);
    if (place >= 0) map.choose(place);
    else leave();
  });
  canvas.addEventListener("pointerleave", leave);
  canvas.addEventListener("blur", () => map.choose(-1));
  canvas.addEventListener("focus", () => {
    if (map.chosen < 0 && map.cells.length && canvas.matches(":focus-visible")) map.choose(0, true);
  });
  canvas.addEventListener("keydown", (event) => {
    const arrow = event.key.startsWith("Arrow");
    if (!map.cells.length || !(arrow || event.key === "Escape")) return;
    event.preventDefault();
    event.stopPropagation(); // the graph moves its nodes with the same keys
    if (!arrow) map.choose(-1);
    else map.choose(map.chosen < 0 ? 0 : map.beside(event.key), true);
  });
}
