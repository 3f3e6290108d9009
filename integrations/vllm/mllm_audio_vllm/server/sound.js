// Sounds as the server sends them, 16-bit mono samples, and the WAV files they are saved as.

export const toBytes = (base64) => Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));

/** A sound that may still be arriving. */
export class Sound {
  constructor(sampleRate) {
    this.sampleRate = sampleRate;
    this.samples = new Int16Array(sampleRate); // `length` of them are filled
    this.length = 0;
    this.complete = false;
    this.peak = 0; // largest magnitude, of 32768
    this.rest = null; // the first byte of a sample whose second has not come yet
  }

  get seconds() {
    return this.length / this.sampleRate;
  }

  /** Append little-endian samples; a piece may end within one. */
  append(bytes) {
    if (this.rest !== null) {
      const joined = new Uint8Array(bytes.length + 1);
      joined[0] = this.rest;
      joined.set(bytes, 1);
      bytes = joined;
    }
    const count = bytes.length >> 1;
    this.rest = bytes.length % 2 ? bytes[bytes.length - 1] : null;
    this.#reserve(this.length + count);
    const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    for (let i = 0; i < count; i++) {
      const sample = view.getInt16(2 * i, true);
      this.samples[this.length + i] = sample;
      this.peak = Math.max(this.peak, Math.abs(sample));
    }
    this.length += count;
  }

  finish() {
    this.complete = true;
  }

  #reserve(length) {
    if (length <= this.samples.length) return;
    const longer = new Int16Array(Math.max(length, 2 * this.samples.length));
    longer.set(this.samples.subarray(0, this.length));
    this.samples = longer;
  }

  /** Return the bytes of a WAV file of all that has come. */
  wav() {
    const bytes = new Uint8Array(44 + 2 * this.length);
    const view = new DataView(bytes.buffer);
    const text = (offset, word) => [...word].forEach((c, i) => view.setUint8(offset + i, c.charCodeAt(0)));
    text(0, "RIFF");
    view.setUint32(4, 36 + 2 * this.length, true);
    text(8, "WAVEfmt ");
    view.setUint32(16, 16, true);
    view.setUint16(20, 1, true); // PCM
    view.setUint16(22, 1, true); // mono
    view.setUint32(24, this.sampleRate, true);
    view.setUint32(28, 2 * this.sampleRate, true);
    view.setUint16(32, 2, true);
    view.setUint16(34, 16, true);
    text(36, "data");
    view.setUint32(40, 2 * this.length, true);
    for (let i = 0; i < this.length; i++) view.setInt16(44 + 2 * i, this.samples[i], true);
    return bytes;
  }

  /** Return the WAV file in base64, as messages carry it. */
  base64() {
    const bytes = this.wav();
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    return btoa(text);
  }
}

/** Decode a file or a recording that the browser can read, at `sampleRate`, to a complete sound. */
export async function decode(blob, sampleRate) {
  const context = new OfflineAudioContext(1, 1, sampleRate); // decoding resamples to its rate
  const buffer = await context.decodeAudioData(await blob.arrayBuffer());
  const sound = new Sound(sampleRate);
  const bytes = new DataView(new ArrayBuffer(2 * buffer.length));
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, k) => buffer.getChannelData(k));
  for (let i = 0; i < buffer.length; i++) {
    const mean = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    bytes.setInt16(2 * i, Math.max(-32768, Math.min(32767, Math.round(mean * 32768))), true);
  }
  sound.append(new Uint8Array(bytes.buffer));
  sound.finish();
  return sound;
}
