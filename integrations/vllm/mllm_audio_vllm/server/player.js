// Plays sounds while they arrive: each piece is scheduled to the sample behind the one before.

const LEAD = 0.03; // seconds from scheduling to sounding
const HOLD = 0.2; // seconds held back before a sound starts, against late pieces
const MAX_HOLD = 2; // what HOLD doubles to, gap by gap

export class Player {
  #context = null;
  #queue = []; // sounds not scheduled to their end; the first is being played
  #next = 0; // sample of the first one to schedule
  #started = false; // the first one sounds, or did until it ran dry
  #until = 0; // frame of the context's clock at which what is scheduled ends
  #dryAt = null; // frame at which a gap began
  #pieces = []; // {sound, from, at, until} that are scheduled; from in samples, the rest in frames
  #hold = HOLD;

  constructor() {
    this.gaps = { count: 0, seconds: 0 }; // since `reset`
  }

  /** Make ready to play; browsers allow it only within a click or a key press. */
  unlock(sampleRate) {
    // At the sounds' own rate the pieces are not resampled one by one, which would be heard.
    if (this.#context?.sampleRate !== sampleRate) {
      this.#context?.close();
      this.#context = new AudioContext({ sampleRate });
    }
    this.#context.resume();
  }

  /** Forget the gaps of earlier sounds, and what they taught. */
  reset() {
    this.gaps = { count: 0, seconds: 0 };
    this.#hold = HOLD;
  }

  /** Play a sound from a position in samples, instead of what plays now. */
  play(sound, from = 0) {
    this.unlock(sound.sampleRate);
    this.pause();
    this.#queue = [sound];
    this.#next = from;
    this.pump();
  }

  /** Play a sound after those that play or wait. */
  follow(sound) {
    this.#queue.push(sound);
    this.pump();
  }

  pause() {
    for (const { source } of this.#pieces) source.stop();
    this.#pieces = [];
    this.#queue = [];
    this.#next = this.#until = 0;
    this.#started = false;
    this.#dryAt = null;
  }

  get active() {
    return this.#queue.length > 0 || this.#pieces.length > 0;
  }

  /** Tell whether a sound plays, or is the next to and waits for samples. */
  plays(sound) {
    const now = this.#now();
    const current = this.#pieces.find((piece) => piece.until > now)?.sound ?? this.#queue[0];
    return current === sound;
  }

  /** Tell whether a sound will play after another one. */
  awaits(sound) {
    const listed = this.#queue.includes(sound) || this.#pieces.some((piece) => piece.sound === sound);
    return listed && !this.plays(sound);
  }

  /** Tell whether a sound has to wait for samples that have not come. */
  isDry(sound) {
    return this.#queue[0] === sound && !this.#started;
  }

  /** Return the sample of a sound that is heard now, null where it is not playing. */
  position(sound) {
    const now = this.#now();
    const started = this.#pieces.filter((piece) => piece.sound === sound && piece.at <= now);
    const piece = started.at(-1);
    return piece ? piece.from + Math.min(now, piece.until) - piece.at : null;
  }

  /** Schedule what has come; call it when samples arrive and now and then while playing. */
  pump() {
    if (!this.#context) return;
    const now = this.#now();
    this.#noticeGap(now);
    while (this.#queue.length) {
      const sound = this.#queue[0];
      const ready = sound.length - this.#next;
      const ahead = ready + Math.max(0, this.#until - now);
      if (!sound.complete && !this.#started && ahead < this.#hold * sound.sampleRate) break;
      if (ready > 0) this.#schedule(sound, now);
      if (!sound.complete) break;
      this.#queue.shift();
      this.#next = 0;
      this.#started = false;
    }
    this.#pieces = this.#pieces.filter((piece) => piece.until > now || this.#queue.includes(piece.sound));
  }

  #now() {
    return this.#context ? Math.round(this.#context.currentTime * this.#context.sampleRate) : 0;
  }

  #noticeGap(now) {
    if (!this.#started || this.#until >= now) return;
    const sound = this.#queue[0];
    if (sound.complete && sound.length === this.#next) return; // it has come to its end
    this.#started = false;
    this.#dryAt = this.#until;
    this.#hold = Math.min(2 * this.#hold, MAX_HOLD);
    this.gaps.count += 1;
  }

  #schedule(sound, now) {
    const { sampleRate } = this.#context;
    const soonest = now + Math.ceil(LEAD * sampleRate);
    const at = this.#started || this.#until > now ? this.#until : soonest;
    if (this.#dryAt !== null) this.gaps.seconds += (at - this.#dryAt) / sampleRate;
    const buffer = this.#context.createBuffer(1, sound.length - this.#next, sampleRate);
    const channel = buffer.getChannelData(0);
    for (let i = 0; i < channel.length; i++) channel[i] = sound.samples[this.#next + i] / 32768;
    const source = this.#context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.#context.destination);
    source.start(at / sampleRate);
    this.#pieces.push({ sound, from: this.#next, at, until: at + channel.length, source });
    this.#until = at + channel.length;
    this.#next = sound.length;
    this.#started = true;
    this.#dryAt = null;
  }
}
