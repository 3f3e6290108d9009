// One sound on the page: its waveform and spectrogram, drawn while it arrives, and its buttons.

import { element } from "./dom.js";
import { makeColours, melOf, ROWS, Spectrum } from "./spectrum.js";

const COLOURS = makeColours();
const FIRST_EXTENT = 1; // seconds on the axis of a sound whose end is not known; it doubles
const SECOND_STEPS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600];
const HERTZ = [200, 500, 1000, 2000, 4000, 8000, 16000];
const ICONS = { play: "M7 4.5v15l12.5-7.5z", pause: "M6 5h4v14H6zM14 5h4v14h-4z" };

export class SoundView {
  /**
   * @param sound that is drawn, complete or not.
   * @param player that plays it.
   * @param options name: what it is called; file: of the download; maxSeconds: of any sound;
   *   seconds: its length, where that is known before it has come.
   */
  constructor(sound, player, { name, file, maxSeconds, seconds = null }) {
    Object.assign(this, { sound, player, name, maxSeconds, seconds });
    this.spectrum = new Spectrum(sound.sampleRate, maxSeconds);
    this.lows = [];
    this.highs = []; // of the samples of each column
    this.store = element("canvas", { width: 256, height: ROWS }); // a pixel per level
    this.columns = 0; // of `store` that are drawn
    this.drawn = -1; // samples on the canvases
    this.#build(file);
    new ResizeObserver(() => this.redraw()).observe(this.screen);
  }

  #build(file) {
    this.waveform = element("canvas", { className: "waveform" });
    this.spectrogram = element("canvas", { className: "spectrogram" });
    this.head = element("div", { className: "head", hidden: true });
    this.screen = element("div", { className: "screen", role: "slider", tabIndex: 0 },
      this.waveform, this.spectrogram, this.head);
    this.screen.setAttribute("aria-label", `Position in ${this.name}`);
    this.hertz = element("div", { className: "hertz", ariaHidden: "true" });
    this.axis = element("div", { className: "axis", ariaHidden: "true" });
    this.icon = document.createElementNS("http://www.w3.org/2000/svg", "path");
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("viewBox", "0 0 24 24");
    svg.setAttribute("aria-hidden", "true");
    svg.append(this.icon);
    this.word = element("span", {});
    this.button = element("button", { type: "button", className: "play" }, svg, this.word);
    this.time = element("span", { className: "time" });
    this.level = element("span", { className: "level" });
    this.download = element("button", { type: "button", className: "download", disabled: true,
      textContent: "Download WAV" });
    this.root = element("figure", { className: "sound" },
      element("div", { className: "plot" }, this.hertz, this.screen, this.axis),
      element("figcaption", {}, this.button, this.time, this.level, this.download));
    this.root.setAttribute("aria-label", this.name);
    this.button.addEventListener("click", () => this.toggle());
    this.download.addEventListener("click", () => save(this.sound.wav(), file));
    this.screen.addEventListener("keydown", (event) => this.#pressed(event));
    this.screen.addEventListener("pointerdown", (event) => this.#pointed(event));
    this.#label();
  }

  /** Return the seconds that the axis spans. */
  get extent() {
    if (this.sound.complete) return Math.max(this.sound.seconds, 0.01);
    let extent = this.seconds ?? FIRST_EXTENT;
    while (extent < this.sound.seconds) extent *= 2;
    return extent;
  }

  toggle() {
    if (this.player.plays(this.sound)) this.player.pause();
    else this.player.play(this.sound, this.resume ?? 0);
    this.resume = null;
    this.render();
    this.onchange?.();
  }

  /** Go to a time; it plays on from there if it plays, else from there when it is started. */
  seek(seconds) {
    const at = Math.round(Math.max(0, Math.min(this.sound.seconds, seconds)) * this.sound.sampleRate);
    if (this.player.plays(this.sound)) this.player.play(this.sound, at);
    else this.resume = at < this.sound.length ? at : null;
    this.render();
    this.onchange?.();
  }

  #pointed(event) {
    const box = this.screen.getBoundingClientRect();
    this.seek(((event.clientX - box.left) / box.width) * this.extent);
  }

  #pressed(event) {
    const now = (this.player.position(this.sound) ?? this.resume ?? 0) / this.sound.sampleRate;
    const step = Math.max(0.05, this.extent / 20);
    const targets = { ArrowLeft: now - step, ArrowDown: now - step, ArrowRight: now + step,
      ArrowUp: now + step, Home: 0, End: this.sound.seconds - step };
    if (event.key === " " || event.key === "Enter") this.toggle();
    else if (event.key in targets) this.seek(targets[event.key]);
    else return;
    event.preventDefault();
  }

  /** Draw everything again: the size or the colours have changed. */
  redraw() {
    this.drawn = -1;
    this.render();
  }

  /** Bring the page up to what has come and to what is heard. */
  render() {
    const state = this.sound.length + (this.sound.complete ? 0.5 : 0);
    if (state !== this.drawn) {
      this.drawn = state;
      this.#analyse();
      this.#drawSpectrogram();
      this.#drawWaveform();
      this.#label();
    }
    this.#follow();
  }

  #analyse() {
    const { sound, spectrum } = this;
    for (let start = this.lows.length * spectrum.hop; ; start += spectrum.hop) {
      const end = Math.min(start + spectrum.hop, sound.length);
      if (end <= start || (end < start + spectrum.hop && !sound.complete)) break;
      const piece = sound.samples.subarray(start, end);
      this.lows.push(Math.min(...piece));
      this.highs.push(Math.max(...piece));
    }
    const columns = spectrum.columns(sound.length, sound.complete);
    if (columns > this.store.width) this.#widen(columns);
    const context = this.store.getContext("2d");
    const image = context.createImageData(Math.max(1, columns - this.columns), ROWS);
    const levels = new Uint8Array(ROWS);
    for (let column = this.columns; column < columns; column++) {
      spectrum.column(column, sound.samples, sound.length, levels);
      for (let row = 0; row < ROWS; row++) {
        const pixel = 4 * ((ROWS - 1 - row) * image.width + column - this.columns);
        image.data.set(COLOURS[levels[row]], pixel);
        image.data[pixel + 3] = 255;
      }
    }
    if (columns > this.columns) context.putImageData(image, this.columns, 0);
    this.columns = columns;
  }

  #widen(columns) {
    const wider = element("canvas", { width: Math.max(columns, 2 * this.store.width), height: ROWS });
    wider.getContext("2d").drawImage(this.store, 0, 0);
    this.store = wider;
  }

  #drawSpectrogram() {
    const { context, width, height } = fitted(this.spectrogram);
    if (!this.columns) return;
    const shown = Math.min(this.columns * this.spectrum.hop, this.sound.length) / this.sound.sampleRate;
    const columns = (shown * this.sound.sampleRate) / this.spectrum.hop;
    context.drawImage(this.store, 0, 0, columns, ROWS, 0, 0, (shown / this.extent) * width, height);
  }

  #drawWaveform() {
    const { context, width, height } = fitted(this.waveform);
    const step = (this.spectrum.hop / this.sound.sampleRate / this.extent) * width;
    const scale = (0.47 * height) / Math.max(this.sound.peak, 328); // silence stays a line
    context.fillStyle = getComputedStyle(this.waveform).color;
    context.fillRect(0, height / 2 - 0.5, width, 1);
    context.beginPath();
    this.highs.forEach((high, i) => {
      const span = (high - this.lows[i]) * scale + 1;
      context.rect(i * step, height / 2 - high * scale - 0.5, Math.max(step, 1), span);
    });
    context.fill();
  }

  #label() {
    const top = melOf(this.sound.sampleRate / 2);
    const hertz = HERTZ.filter((value) => value < 0.45 * this.sound.sampleRate);
    this.hertz.replaceChildren(...hertz.map((value) => {
      const tick = element("span", { textContent: value < 1000 ? `${value} Hz` : `${value / 1000} kHz` });
      tick.style.bottom = `${(100 * melOf(value)) / top}%`;
      return tick;
    }));
    const step = SECOND_STEPS.find((value) => this.extent / value <= 6) ?? 3600;
    const count = Math.floor(this.extent / step + 1e-6);
    this.axis.replaceChildren(...Array.from({ length: count + 1 }, (_, i) => {
      const tick = element("span", { textContent: i ? Number((i * step).toFixed(1)) : "0 s" });
      tick.style.left = `${(100 * i * step) / this.extent}%`;
      tick.classList.toggle("last", i > 0 && i * step > 0.97 * this.extent);
      return tick;
    }));
    const peak = 20 * Math.log10(this.sound.peak / 32768);
    this.level.textContent = this.sound.peak ? `peak ${peak.toFixed(1)} dBFS`.replace("-", "\u2212") : "";
    this.level.title = "The largest sample, in decibels below full scale. The waveform is scaled to it, "
      + "the spectrogram is not.";
    this.download.disabled = !this.sound.complete;
  }

  #follow() {
    const { sound, player } = this;
    const plays = player.plays(sound);
    const position = player.position(sound) ?? this.resume;
    const seconds = (position ?? 0) / sound.sampleRate;
    const remark = this.#remark(plays);
    const shown = [position, plays, remark, this.drawn].join();
    if (shown === this.shown) return; // every frame comes here, for every sound of the page
    this.shown = shown;
    this.head.hidden = position === null || position === undefined;
    this.head.style.left = `${(100 * seconds) / this.extent}%`;
    this.icon.setAttribute("d", plays ? ICONS.pause : ICONS.play);
    this.word.textContent = plays ? "Pause" : "Play";
    this.button.setAttribute("aria-label", `${this.word.textContent} ${this.name}`);
    this.button.disabled = sound.length === 0;
    this.time.textContent = `${seconds.toFixed(2)} / ${sound.seconds.toFixed(2)} s${remark}`;
    this.screen.setAttribute("aria-valuemin", "0");
    this.screen.setAttribute("aria-valuemax", sound.seconds.toFixed(2));
    this.screen.setAttribute("aria-valuenow", seconds.toFixed(2));
    this.screen.setAttribute("aria-valuetext",
      `${seconds.toFixed(2)} of ${sound.seconds.toFixed(2)} seconds`);
  }

  #remark(plays) {
    if (this.player.awaits(this.sound)) return " \u00b7 plays next";
    if (plays && this.player.isDry(this.sound) && !this.sound.complete) return " \u00b7 waiting";
    return this.sound.complete ? "" : " so far";
  }
}

/** Draw the colours of the spectrogram, from the quietest to the loudest. */
export function drawKey(canvas) {
  Object.assign(canvas, { width: 256, height: 1 });
  const context = canvas.getContext("2d");
  const image = context.createImageData(256, 1);
  COLOURS.forEach((colour, i) => image.data.set([...colour, 255], 4 * i));
  context.putImageData(image, 0, 0);
}

/** Clear a canvas and give it a pixel for each of the screen's. */
function fitted(canvas) {
  const width = Math.round(canvas.clientWidth * devicePixelRatio) || 1;
  const height = Math.round(canvas.clientHeight * devicePixelRatio) || 1;
  Object.assign(canvas, { width, height });
  return { context: canvas.getContext("2d"), width, height };
}

function save(bytes, name) {
  const blob = new Blob([bytes], { type: "audio/wav" });
  const link = element("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}
