// The loss of a training over its steps, each one faint and smoothed, and the mean rank.
import { Surface, theme } from "./surface.mjs";
import { number, t } from "./text.mjs";

const FONT = "10px system-ui, -apple-system, 'Segoe UI', sans-serif";
const HEIGHT = 128;
const [LEFT, RIGHT, TOP, BOTTOM] = [40, 34, 8, 18];
const MOST_POINTS = 12_000; // twice as many are thinned out: no screen has as many columns
const STROKE = 24; // points in one go of the pen
const BEGINNING = 0.02; // of the points, which do not count for the scale
const ASKED = 600; // points that the scale of the loss looks at
// Told apart by nearly every kind of colour vision, and in grey by their lightness.
const INKS = {
  dark: { loss: "#6cb2ff", rank: "#f0c14b" },
  light: { loss: "#1759a8", rank: "#8a5a00" },
};

/** The colours of the two curves on the surface of now. */
export function inks() {
  return theme().dark ? INKS.dark : INKS.light;
}

export class Curve {
  constructor(host, { label, testid = "lora2-curve" }) {
    this.label = label;
    this.surface = new Surface(host, {
      height: HEIGHT,
      testid,
      draw: (...args) => this.draw(...args),
    });
    this.canvas = this.surface.canvas;
    this.canvas.setAttribute("role", "img");
    this.set({});
  }

  /** Show this history; `total`: the step at which the curve ends, where it is known. */
  set({ steps = [], loss = [], smoothed = [], mean_rank = [], target_rank = null, total = 0 }) {
    this.steps = [...steps];
    this.loss = [...loss];
    this.smoothed = steps.map((_, i) => smoothed[i] ?? loss[i]);
    this.rank = steps.map((_, i) => mean_rank[i] ?? NaN);
    this.target = target_rank;
    this.total = total || this.total || 0;
    this.changed();
  }

  /** Go on with [[step, loss, mean rank], …]; `smoothed`: at the last of them, if known. */
  add(points, smoothed = null) {
    const fresh = points.filter(([step]) => step > (this.steps.at(-1) ?? 0));
    const from = this.smoothed.at(-1) ?? fresh[0]?.[1];
    const to = smoothed ?? from;
    fresh.forEach(([step, loss, rank], place) => {
      this.steps.push(step);
      this.loss.push(loss);
      this.smoothed.push(from + ((to - from) * (place + 1)) / fresh.length);
      this.rank.push(rank ?? NaN);
    });
    if (this.steps.length > 2 * MOST_POINTS) this.thin();
    if (fresh.length) this.changed();
  }

  destroy() {
    this.surface.destroy();
  }

  thin() {
    for (const name of ["steps", "loss", "smoothed", "rank"]) {
      this[name] = this[name].filter((_, place) => place % 2 === this[name].length % 2 ^ 1);
    }
  }

  changed() {
    this.scales = null;
    this.surface.request();
  }

  // --- drawing ---------------------------------------------------------------------------------

  draw(context, width, height) {
    const colours = theme();
    const count = this.steps.length;
    this.describe(count);
    context.font = FONT;
    if (!count) {
      context.fillStyle = colours.faint;
      context.textAlign = "center";
      context.fillText(t("curve_empty"), width / 2, height / 2);
      return;
    }
    const frame = { left: LEFT, right: width - RIGHT, top: TOP, bottom: height - BOTTOM };
    const scales = (this.scales ??= this.measure());
    const x = across(frame, scales.steps);
    this.drawAxes(context, frame, scales, x, colours);
    context.save();
    context.beginPath();
    context.rect(frame.left - 1, frame.top - 2, frame.right - frame.left + 2, frame.bottom - frame.top + 4);
    context.clip();
    const { loss, rank } = inks();
    const [up, high] = [upwards(frame, scales.loss), upwards(frame, scales.rank)];
    if (this.target) this.drawTarget(context, frame, high, rank);
    scatter(context, this.steps, this.loss, x, up, loss);
    trace(context, this.steps, this.rank, x, high, { colour: rank, width: 1.5 });
    trace(context, this.steps, this.smoothed, x, up, { colour: loss, width: 2 });
    context.restore();
  }

  describe(count) {
    this.canvas.dataset.points = String(count);
    const last = (values, digits) => number(values.at(-1), digits);
    const told = count
      ? t("curve_summary", {
          points: count,
          loss: last(this.smoothed, 3),
          rank: last(this.rank, 1),
        })
      : t("curve_empty");
    this.canvas.setAttribute("aria-label", `${this.label}: ${told}`);
  }

  /** The ends of the three scales: nearly all losses, every mean rank, every step. */
  measure() {
    const stride = Math.max(1, Math.ceil(this.loss.length / ASKED));
    const some = this.loss.filter((v, i) => i % stride === 0 && Number.isFinite(v));
    some.sort((a, b) => a - b);
    const at = (share) => some[Math.round(share * (some.length - 1))] ?? 0;
    let [low, high] = [at(0.01), at(0.98)];
    // The steep way down at the very beginning may leave the frame: what follows is of interest.
    for (let i = Math.floor(this.smoothed.length * BEGINNING); i < this.smoothed.length; i += 1) {
      if (this.smoothed[i] < low) low = this.smoothed[i];
      if (this.smoothed[i] > high) high = this.smoothed[i];
    }
    let [least, most] = this.target ? [this.target, this.target] : [Infinity, 1];
    for (const value of this.rank) {
      if (value < least) least = value; // false for what is not a number
      if (value > most) most = value;
    }
    least = Math.min(least, most);
    return {
      steps: ends(0, horizon(this.steps.at(-1), this.total)),
      loss: ends(low, high),
      rank: ends(least, most, most * 0.1),
    };
  }

  drawAxes(context, frame, scales, x, colours) {
    const { loss, rank } = inks();
    context.lineWidth = 1;
    context.strokeStyle = colours.line;
    context.textBaseline = "middle";
    for (const share of [0, 0.5, 1]) {
      const y = Math.round(frame.bottom - share * (frame.bottom - frame.top)) + 0.5;
      line(context, frame.left, y, frame.right, y);
      context.fillStyle = loss;
      context.textAlign = "right";
      context.fillText(short(between(scales.loss, share), scales.loss), frame.left - 6, y);
      context.fillStyle = rank;
      context.textAlign = "left";
      context.fillText(short(between(scales.rank, share), scales.rank), frame.right + 6, y);
    }
    context.textBaseline = "alphabetic";
    context.fillStyle = colours.faint;
    for (const [share, align] of [[0, "left"], [0.5, "center"], [1, "right"]]) {
      const step = Math.round(between(scales.steps, share));
      context.textAlign = align;
      context.fillText(number(step), x(step), frame.bottom + 14);
    }
  }

  drawTarget(context, frame, high, colour) {
    context.save();
    context.strokeStyle = colour;
    context.globalAlpha = 0.7;
    context.setLineDash([3, 3]);
    line(context, frame.left, high(this.target), frame.right, high(this.target));
    context.restore();
  }
}

function ends(low, high, least = Math.abs(high) * 0.02 || 1e-6) {
  if (high - low >= least) return [low, high];
  const middle = (low + high) / 2;
  return [Math.max(0, middle - least / 2), middle + least / 2];
}

/** How far the axis reaches: some way beyond the last step, in the end to the last of all. */
function horizon(last, total) {
  const wanted = Math.max(20, last * 1.25);
  const power = 10 ** Math.floor(Math.log10(wanted));
  const round = power * [1, 2, 4, 6, 8, 10].find((times) => times * power >= wanted);
  return Math.max(last, total ? Math.min(total, round) : round);
}

function between([low, high], share) {
  return low + (high - low) * share;
}

function across(frame, [low, high]) {
  const pitch = (frame.right - frame.left) / (high - low || 1);
  return (step) => frame.left + (step - low) * pitch;
}

function upwards(frame, [low, high]) {
  const pitch = (frame.bottom - frame.top) / (high - low);
  return (value) => frame.bottom - (value - low) * pitch;
}

/** As many decimals as tell the two ends of a scale apart. */
function short(value, [low, high]) {
  const digits = Math.max(0, Math.min(4, 1 - Math.floor(Math.log10(high - low))));
  return number(value, digits);
}

function line(context, fromX, fromY, toX, toY) {
  context.beginPath();
  context.moveTo(fromX, fromY);
  context.lineTo(toX, toY);
  context.stroke();
}

/** Every value, faint: a line, or where many points share a pixel's column their span. */
function scatter(context, steps, values, x, y, colour) {
  context.globalAlpha = 0.4;
  context.fillStyle = colour;
  const columns = spans(steps, values, x, y);
  if (columns.length * 1.5 > steps.length) {
    trace(context, steps, values, x, y, { colour, width: 1 });
  } else {
    // Upright bars: a line that runs up and down hundreds of times takes long to fill.
    let before = columns[0];
    for (const [column, low, high] of columns) {
      const top = Math.min(low, before[2]);
      context.fillRect(column, top, 1, Math.max(high, before[1]) - top + 1);
      before = [column, low, high];
    }
  }
  context.globalAlpha = 1;
}

/** [column, lowest, highest] of every pixel's column with a point in it. */
function spans(steps, values, x, y) {
  const found = [];
  let now = null;
  for (let i = 0; i < steps.length; i += 1) {
    if (!Number.isFinite(values[i])) continue;
    const [column, down] = [Math.floor(x(steps[i])), y(values[i])];
    if (now?.[0] !== column) found.push((now = [column, down, down]));
    else if (down < now[1]) now[1] = down;
    else if (down > now[2]) now[2] = down;
  }
  return found;
}

/** One line, in short strokes with a point a pixel: much quicker than one long stroke. */
function trace(context, steps, values, x, y, { colour, width }) {
  context.strokeStyle = context.fillStyle = colour;
  context.lineWidth = width;
  context.lineJoin = "bevel";
  let [right, down, inStroke] = [NaN, NaN, 0];
  for (let i = 0; i < steps.length; i += 1) {
    const next = x(steps[i]);
    if (!Number.isFinite(values[i]) || (next - right < 1 && i < steps.length - 1)) continue;
    if (inStroke === 0) {
      context.beginPath();
      context.moveTo(Number.isNaN(right) ? next : right, Number.isNaN(right) ? y(values[i]) : down);
    }
    [right, down] = [next, y(values[i])];
    context.lineTo(right, down);
    inStroke += 1;
    if (inStroke < STROKE) continue;
    context.stroke();
    inStroke = 0;
  }
  if (inStroke) context.stroke();
  if (width > 1 && !Number.isNaN(right)) dot(context, right, down, width);
}

/** Where the curve is now; with a single point there is nothing else to see. */
function dot(context, x, y, width) {
  context.beginPath();
  context.arc(x, y, width + 0.5, 0, 7);
  context.fill();
}
