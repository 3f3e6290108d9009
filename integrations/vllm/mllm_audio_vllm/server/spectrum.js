// Mel spectra in decibels, and the colours that show them.

export const ROWS = 128; // of a column, lowest frequency first
export const FLOOR = -80; // dB below a sine of full scale: the darkest colour
const WINDOW = 0.045; // seconds of sound in one spectrum
const HOP = 0.004; // seconds between spectra
const MAX_COLUMNS = 8192; // of one sound: longer ones get a wider hop

export const melOf = (hertz) => 1127 * Math.log1p(hertz / 700);
const hertzOf = (mel) => 700 * Math.expm1(mel / 1127);

/** Return f(real, imaginary), which transforms two Float64Arrays of `size`, a power of 2, in place. */
function makeFft(size) {
  const bits = Math.log2(size);
  const reversed = new Uint32Array(size);
  for (let i = 1; i < size; i++) reversed[i] = (reversed[i >> 1] >> 1) | ((i & 1) << (bits - 1));
  const cosine = Float64Array.from({ length: size / 2 }, (_, i) => Math.cos((2 * Math.PI * i) / size));
  const sine = Float64Array.from({ length: size / 2 }, (_, i) => -Math.sin((2 * Math.PI * i) / size));
  return (real, imaginary) => {
    for (let i = 0; i < size; i++) {
      const j = reversed[i];
      if (j <= i) continue;
      [real[i], real[j]] = [real[j], real[i]];
      [imaginary[i], imaginary[j]] = [imaginary[j], imaginary[i]];
    }
    for (let half = 1; half < size; half *= 2) {
      const stride = size / (2 * half);
      for (let block = 0; block < size; block += 2 * half) {
        for (let k = 0; k < half; k++) {
          const low = block + k, high = low + half, turn = k * stride;
          const re = real[high] * cosine[turn] - imaginary[high] * sine[turn];
          const im = real[high] * sine[turn] + imaginary[high] * cosine[turn];
          real[high] = real[low] - re;
          imaginary[high] = imaginary[low] - im;
          real[low] += re;
          imaginary[low] += im;
        }
      }
    }
  };
}

/** Return one {first, weights} per row: triangles on the bins of a transform of `size` points. */
function makeFilters(sampleRate, size) {
  const step = melOf(sampleRate / 2) / (ROWS + 1);
  const binOf = (mel) => (hertzOf(mel) * size) / sampleRate;
  return Array.from({ length: ROWS }, (_, row) => {
    const [low, centre, high] = [row, row + 1, row + 2].map((count) => binOf(count * step));
    const first = Math.ceil(low), last = Math.min(Math.floor(high), size / 2);
    const weights = Float64Array.from({ length: last - first + 1 }, (_, i) => {
      const bin = first + i;
      return bin < centre ? (bin - low) / (centre - low) : (high - bin) / (high - centre);
    });
    return { first, weights };
  });
}

/** Makes columns of one sample rate; 0 dB is a sine of full scale. */
export class Spectrum {
  constructor(sampleRate, maxSeconds) {
    const longest = Math.ceil((maxSeconds * sampleRate) / MAX_COLUMNS);
    this.hop = Math.max(1, Math.round(HOP * sampleRate), longest); // samples
    const length = 2 * Math.round((WINDOW * sampleRate) / 2);
    this.window = Float64Array.from({ length }, (_, i) => Math.sin((Math.PI * (i + 0.5)) / length) ** 2);
    this.size = 2 ** Math.ceil(Math.log2(2 * this.window.length));
    this.fft = makeFft(this.size);
    this.filters = makeFilters(sampleRate, this.size);
    this.full = (this.size * this.window.reduce((sum, w) => sum + w * w, 0)) / 4;
    this.real = new Float64Array(this.size);
    this.imaginary = new Float64Array(this.size);
  }

  /** Count the columns that `length` samples allow; a complete sound is followed by silence. */
  columns(length, complete) {
    if (complete) return Math.ceil(length / this.hop);
    return Math.max(0, Math.floor((length - (this.window.length - this.hop) / 2) / this.hop));
  }

  /** Fill `levels` (ROWS bytes, 0 = FLOOR, 255 = 0 dB) with a column of 16-bit samples. */
  column(index, samples, length, levels) {
    const start = Math.round((index + 0.5) * this.hop - this.window.length / 2);
    this.real.fill(0);
    this.imaginary.fill(0);
    for (let i = Math.max(0, -start); i < this.window.length && start + i < length; i++)
      this.real[i] = (samples[start + i] / 32768) * this.window[i];
    this.fft(this.real, this.imaginary);
    this.filters.forEach(({ first, weights }, row) => {
      let power = 0;
      for (let i = 0; i < weights.length; i++)
        power += weights[i] * (this.real[first + i] ** 2 + this.imaginary[first + i] ** 2);
      const decibels = 10 * Math.log10(power / this.full + 1e-12);
      levels[row] = Math.max(0, Math.min(255, 255 * (1 - decibels / FLOOR)));
    });
  }
}

/** Return 256 RGB triples whose lightness rises evenly: a path through Oklab, violet to cream. */
export function makeColours() {
  const gamma = (v) => (v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055);
  return Array.from({ length: 256 }, (_, level) => {
    const t = level / 255;
    const lightness = 0.15 + 0.82 * t;
    const chroma = 0.03 + 0.155 * Math.sin(Math.PI * t ** 0.85);
    const hue = ((280 + 180 * t) * Math.PI) / 180;
    const a = chroma * Math.cos(hue), b = chroma * Math.sin(hue);
    // Oklab to linear sRGB, Ottosson 2020.
    const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
    const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
    const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
    return [
      4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
      -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
      -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
    ].map((v) => Math.round(255 * gamma(Math.max(0, Math.min(1, v)))));
  });
}
