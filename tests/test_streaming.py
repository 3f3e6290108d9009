"""Latents that arrive in portions: the sound of a stream beside that of the whole clip."""

import itertools

import pytest
import torch
from test_tokenizers import noise, write_random_audioldm

from mllm_audio.generation.stream import StreamingDecoder
from mllm_audio.tokenizers import DCTConfig, DCTTokenizer, StreamConfig, load_tokenizer
from mllm_audio.tokenizers.dct import DCTDecoder
from mllm_audio.tokenizers.griffin_lim import GriffinLim
from mllm_audio.tokenizers.windows import WindowedDecoder

COLUMN = 2560  # samples
TOKENS = 4  # of a column


@pytest.fixture(scope="module")
def audioldm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("audioldm")
    write_random_audioldm(folder, seed=0)
    return load_tokenizer(f"audioldm:{folder}")


@pytest.fixture(params=["dct", "audioldm"])
def tokenizer(request):
    return load_tokenizer("dct") if request.param == "dct" else request.getfixturevalue("audioldm")


def latents_of(tokenizer, num_columns: int, seed: int = 0) -> torch.Tensor:
    """Encode noise of changing level to (N, D) latents."""
    level = torch.linspace(0.2, 1, num_columns).repeat_interleave(COLUMN)
    with torch.no_grad():
        return tokenizer.encode(noise(1, num_columns * COLUMN, seed=seed) * level)[0]


def stream(decoder, portions) -> list[torch.Tensor]:
    return [*(decoder.push(portion) for portion in portions), decoder.finish()]


def decibels(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the seam error: 20 log10 of rms error over rms signal."""
    power = (actual - expected).square().mean() / expected.square().mean()
    return 10 * power.log10().item()


# Any tokenizer


@pytest.mark.parametrize("num_columns", [1, 2, 3, 4, 5, 11])
def test_stream_has_as_many_samples_as_decode(tokenizer, num_columns):
    latents = latents_of(tokenizer, num_columns)
    parts = stream(StreamingDecoder(tokenizer), latents.split(3))
    expected = tokenizer.decode(latents[None])[0]
    assert torch.cat(parts).shape == expected.shape == (num_columns * COLUMN,)


@pytest.mark.parametrize("seed", range(5))
def test_portions_change_no_sample(tokenizer, seed):
    latents = latents_of(tokenizer, 9)
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, len(latents) + 1, (12,), generator=generator).sort().values
    bounds = [0, *cuts.tolist(), len(latents)]  # some portions are empty
    portions = [latents[start:end] for start, end in itertools.pairwise(bounds)]
    assert any(len(portion) == 0 for portion in [*portions, latents[:0]])
    found = torch.cat(stream(StreamingDecoder(tokenizer), portions))
    together = torch.cat(stream(StreamingDecoder(tokenizer), [latents]))
    one_by_one = torch.cat(stream(StreamingDecoder(tokenizer), latents.split(1)))
    assert torch.equal(found, together)
    assert torch.equal(found, one_by_one)


def test_first_samples_come_within_four_columns(tokenizer):
    latents = latents_of(tokenizer, 12)
    decoder = StreamingDecoder(tokenizer)
    counts = [len(decoder.push(column)) for column in latents.split(TOKENS)]
    assert any(counts[:4])
    assert sum(counts) >= (12 - 4) * COLUMN
    assert all(a or b for a, b in itertools.pairwise(counts[3:]))


def test_state_does_not_grow_with_the_clip(tokenizer):
    def size(value, seen) -> int:
        """Count the bytes of all storage that `value` reaches."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            new = storage.data_ptr() not in seen
            seen.add(storage.data_ptr())
            return storage.nbytes() * new
        if isinstance(value, (list, tuple)):
            return sum(size(v, seen) for v in value)
        if type(value) in (StreamingDecoder, DCTDecoder, GriffinLim, WindowedDecoder):
            return sum(size(v, seen) for v in vars(value).values())
        return 0

    latents = latents_of(tokenizer, 2)
    decoder = StreamingDecoder(tokenizer)
    sizes = []
    for _ in range(24):
        decoder.push(latents)
        sizes.append(size(decoder, set()))
    assert sizes[6] > 10_000
    assert set(sizes[6:]) == {sizes[6]}


def test_incomplete_column_is_held_back_then_dropped(tokenizer):
    latents = latents_of(tokenizer, 3)
    whole = stream(StreamingDecoder(tokenizer), [latents[: 2 * TOKENS]])
    cut = stream(StreamingDecoder(tokenizer), [latents[: 3 * TOKENS - 1]])
    assert torch.equal(torch.cat(cut), torch.cat(whole))


def test_span_without_a_column_is_silent(tokenizer):
    assert StreamingDecoder(tokenizer).finish().shape == (0,)
    parts = stream(StreamingDecoder(tokenizer), [torch.zeros(0, 128), torch.zeros(3, 128)])
    assert [part.shape for part in parts] == [(0,)] * 3


def test_streams_side_by_side_do_not_meet(tokenizer):
    clips = [latents_of(tokenizer, 6, seed=seed) for seed in (1, 2)]
    alone = [torch.cat(stream(StreamingDecoder(tokenizer), clip.split(5))) for clip in clips]
    decoders = [StreamingDecoder(tokenizer) for _ in clips]
    parts = [[], []]
    for portions in zip(*(clip.split(5) for clip in clips), strict=True):
        for decoder, portion, found in zip(decoders, portions, parts, strict=True):
            found.append(decoder.push(portion))
    for decoder, found, expected in zip(decoders, parts, alone, strict=True):
        assert torch.equal(torch.cat([*found, decoder.finish()]), expected)


def test_gradients_are_not_kept(tokenizer):
    latents = latents_of(tokenizer, 3).requires_grad_()
    decoder = StreamingDecoder(tokenizer)
    assert not any(part.requires_grad for part in stream(decoder, latents.split(4)))


def test_misuse_is_refused(tokenizer):
    decoder = StreamingDecoder(tokenizer)
    for shape in [(128,), (4, 127), (1, 4, 128)]:
        with pytest.raises(ValueError, match=r"takes \(M, 128\) latents, not \(" + str(shape[0])):
            decoder.push(torch.zeros(shape))
    decoder.finish()
    with pytest.raises(ValueError, match="span has ended; make a StreamingDecoder"):
        decoder.push(torch.zeros(4, 128))
    with pytest.raises(ValueError, match="span has ended; make a StreamingDecoder"):
        decoder.finish()


# DCT


@pytest.mark.parametrize("num_columns", [1, 2, 3, 4, 13])
def test_dct_stream_is_decode_bit_for_bit(num_columns):
    tokenizer = DCTTokenizer()
    latents = latents_of(tokenizer, num_columns)
    found = torch.cat(stream(StreamingDecoder(tokenizer), latents.split(5)))
    assert found.abs().max() > 0.01
    assert torch.equal(found, tokenizer.decode(latents[None])[0])


@pytest.mark.parametrize(("num_iterations", "look_ahead"), [(1, 3), (7, 0), (8, 2), (9, 1)])
def test_dct_stream_is_decode_whatever_the_settings(num_iterations, look_ahead):
    tokenizer = DCTTokenizer(DCTConfig(num_iterations=num_iterations, look_ahead=look_ahead))
    latents = latents_of(tokenizer, 5)
    decoder = StreamingDecoder(tokenizer)
    parts = stream(decoder, latents.split(TOKENS))
    assert torch.equal(torch.cat(parts), tokenizer.decode(latents[None])[0])
    assert [len(part) > 0 for part in parts] == [i >= look_ahead for i in range(6)]


def test_dct_sound_depends_on_nothing_behind_its_look_ahead():
    tokenizer = DCTTokenizer()
    first, other = latents_of(tokenizer, 8), latents_of(tokenizer, 8, seed=1)
    changed = torch.cat([first[: 5 * TOKENS], other[5 * TOKENS :]])
    found, expected = (tokenizer.decode(x[None])[0] for x in (changed, first))
    settled = (5 - tokenizer.config.look_ahead) * COLUMN - 432  # half a window less half a hop
    assert torch.equal(found[:settled], expected[:settled])
    assert not torch.equal(found[settled : settled + COLUMN], expected[settled : settled + COLUMN])


def test_dct_stream_carries_a_tone_from_column_to_column():
    """Far from its start, where the phases have turned ten thousand times, its pitch is right."""
    tokenizer = DCTTokenizer(DCTConfig(num_iterations=3))
    tone = 0.5 * torch.sin(2 * torch.pi * 440 / 16_000 * torch.arange(3 * COLUMN))[None]
    column = tokenizer.encode(tone)[0, TOKENS : 2 * TOKENS]
    decoder = StreamingDecoder(tokenizer)
    pieces = [decoder.push(column) for _ in range(150)]
    spectra = [torch.fft.rfft(piece, n=1 << 16).abs() for piece in pieces[10::20]]
    peaks = [spectrum.argmax().item() * 16_000 / (1 << 16) for spectrum in spectra]
    assert peaks == pytest.approx([440] * len(peaks), rel=0.02)


# Windows


def test_windows_of_a_decoder_without_memory_are_exact():
    """A decoder that looks no further than its context: nothing is lost, doubled or moved."""
    kernel = torch.randn(1, 1, 2 * 3 + 1, generator=torch.Generator().manual_seed(0))

    def decode(latents):  # 8 samples a column, each from 3 before to 3 behind
        samples = latents.flatten(1).repeat_interleave(4, dim=1)
        return torch.nn.functional.conv1d(samples[:, None], kernel, padding=3)[:, 0]

    latents = torch.randn(2, 2 * 21, 1, generator=torch.Generator().manual_seed(1))
    for chunk, context, look_ahead in [(1, 1, 1), (2, 3, 1), (5, 1, 2)]:
        decoder = WindowedDecoder(
            decode,
            tokens_per_column=2,
            samples_per_column=8,
            sample_rate=200,  # a fade of 4 samples: 4 + 3 are less than a column
            chunk_columns=chunk,
            context=context,
            look_ahead=look_ahead,
        )
        parts = [decoder.push(column) for column in latents.split(2, dim=1)]
        assert [part.shape[1] for part in parts[: chunk + look_ahead]] == [
            *[0] * (chunk + look_ahead - 1),
            chunk * 8,
        ]
        found = torch.cat([*parts, decoder.finish()], dim=1)
        torch.testing.assert_close(found, decode(latents), rtol=0, atol=1e-5)


def test_a_seam_is_faded():
    """Windows whose sound has another level each time meet without a step."""
    levels = itertools.count()

    def decode(latents):
        return torch.full((1, latents.shape[1] * 2560), float(next(levels)))

    decoder = WindowedDecoder(
        decode,
        tokens_per_column=1,
        samples_per_column=2560,
        sample_rate=16_000,
        chunk_columns=1,
        context=0,
        look_ahead=1,
    )
    found = torch.cat([decoder.push(torch.zeros(1, 4, 1)), decoder.finish()], dim=1)[0]
    assert found.shape == (4 * 2560,)
    assert found.diff().abs().max() < 1 / 320 + 1e-6
    assert found.max() == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"chunk_columns": 0}, "stream.chunk_columns=0"),
        ({"look_ahead": -1}, "stream.look_ahead=-1"),
    ],
)
def test_streams_without_a_chunk_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig(**settings)


@pytest.mark.parametrize("settings", [(0, 4, 1), (1, -1, 1), (1, 4, -1)])
def test_so_are_windows_made_by_hand(audioldm, settings):
    chunk, context, ahead = settings
    with pytest.raises(ValueError, match=f"chunk_columns={chunk}, .*look_ahead={ahead}"):
        WindowedDecoder(
            audioldm.decode,
            tokens_per_column=TOKENS,
            samples_per_column=COLUMN,
            sample_rate=16_000,
            chunk_columns=chunk,
            context=context,
            look_ahead=ahead,
        )


@pytest.mark.parametrize("chunk_columns", [1, 3, 4])
@pytest.mark.parametrize("look_ahead", [None, 0, 2])
def test_dct_hands_out_chunks_of_the_size_asked_for(chunk_columns, look_ahead):
    tokenizer = DCTTokenizer()
    latents = latents_of(tokenizer, 10)
    config = StreamConfig(chunk_columns=chunk_columns, look_ahead=look_ahead)
    decoder = StreamingDecoder(tokenizer, config)
    sizes = [len(part) for part in stream(decoder, latents.split(TOKENS))]
    ahead = 1 if look_ahead is None else look_ahead
    first = next(index for index, size in enumerate(sizes, 1) if size)
    assert first == -(-(1 + ahead) // chunk_columns) * chunk_columns
    handed = [size for size in sizes[first:-1] if size]
    assert set(handed) == {chunk_columns * COLUMN} and sum(sizes) == 10 * COLUMN
    other = torch.cat(stream(StreamingDecoder(tokenizer, config), latents.split(7)))
    found = torch.cat(stream(StreamingDecoder(tokenizer, config), latents.split(TOKENS)))
    assert torch.equal(other, found)  # however they are portioned
    own = DCTTokenizer(DCTConfig(look_ahead=ahead))
    assert torch.equal(found, own.decode(latents[None])[0])


def test_audioldm_takes_its_chunk_and_look_ahead_from_the_settings(audioldm):
    latents = latents_of(audioldm, 8)
    decoder = StreamingDecoder(audioldm, StreamConfig(chunk_columns=3, look_ahead=1))
    sizes = [len(part) // COLUMN for part in stream(decoder, latents.split(TOKENS))]
    assert sizes == [0, 0, 0, 3, 0, 0, 3, 0, 2]


def test_audioldm_stream_is_decode_where_a_window_holds_the_clip(audioldm):
    latents = latents_of(audioldm, 3)
    found = torch.cat(stream(StreamingDecoder(audioldm), latents.split(TOKENS)))
    assert torch.equal(found, audioldm.decode(latents[None])[0])


def test_audioldm_stream_is_near_decode(audioldm):
    """With random weights; those of trained ones are not measured here."""
    latents = latents_of(audioldm, 24)
    expected = audioldm.decode(latents[None])
    errors = {}
    for context, look_ahead in [(0, 0), (1, 1), (2, 2), (4, 2), (8, 8), (24, 24)]:
        decoder = WindowedDecoder(
            audioldm.decode,
            tokens_per_column=TOKENS,
            samples_per_column=COLUMN,
            sample_rate=16_000,
            chunk_columns=2,
            context=context,
            look_ahead=look_ahead,
        )
        found = torch.cat([decoder.push(latents[None]), decoder.finish()], dim=1)
        errors[context, look_ahead] = decibels(found, expected)
        print(f"context {context}, look-ahead {look_ahead}: {errors[context, look_ahead]:.1f} dB")
    found = torch.cat(stream(StreamingDecoder(audioldm), latents.split(TOKENS)))
    assert decibels(found[None], expected) == pytest.approx(errors[4, 2], abs=1e-6)
    assert errors[4, 2] < errors[0, 0]
