// The colour of a rank, the same as in the report's picture: see Scale in
// lora2_core/reports/report.py, and CIVIDIS in canvas.py beside it.

// Cividis, which looks nearly the same to every kind of colour vision: every 28th of the 256 colours
// that matplotlib has of it under CC0. Its first eighth is left out, because that blue sinks into a
// dark background.
export const CIVIDIS = [
  [24, 55, 111], [62, 75, 108], [89, 94, 110], [114, 114, 116], [139, 135, 120],
  [166, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56],
]; // prettier-ignore
const CALM = 0.2; // the place of all ranks while they are alike

/** The colour at a share of the scale, 0 to 1. */
function shade(share) {
  const place = Math.min(Math.max(share, 0), 1) * (CIVIDIS.length - 1);
  const low = Math.min(Math.floor(place), CIVIDIS.length - 2);
  const mixed = CIVIDIS[low].map((v, i) => v + (CIVIDIS[low + 1][i] - v) * (place - low));
  return `rgb(${mixed.map(Math.round).join(" ")})`;
}

/** Colours of ranks: logarithmic from 1 to `highest`, or one calm colour for one rank. */
export class Scale {
  constructor(lowest, highest) {
    this.lowest = lowest;
    this.highest = highest;
    this.known = new Map(); // colours by rank: a training asks for the same ones at every step
  }

  get uniform() {
    return this.lowest === this.highest;
  }

  /** The colour of a rank of at least 1. */
  colour(rank) {
    let found = this.known.get(rank);
    if (!found) {
      found = shade(this.uniform ? CALM : Math.log(rank) / Math.log(this.highest));
      this.known.set(rank, found);
    }
    return found;
  }

  /** The same scale where it reaches every one of `ranks`, else a wider one. */
  reaching(ranks) {
    let { lowest, highest } = this;
    for (const rank of ranks) {
      if (rank < 1) continue;
      lowest = Math.min(lowest, rank);
      highest = Math.max(highest, rank);
    }
    const same = lowest === this.lowest && highest === this.highest;
    return same ? this : new Scale(lowest, highest);
  }
}

/** Of no rank at all: to be widened. */
export const NOWHERE = new Scale(Infinity, 0);

/** All colours from left to right, as a context fills with them. */
export function gradient(context, width) {
  const made = context.createLinearGradient(0, 0, width, 0);
  CIVIDIS.forEach((_, i) => {
    const share = i / (CIVIDIS.length - 1);
    made.addColorStop(share, shade(share));
  });
  return made;
}
