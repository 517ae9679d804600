"""Pictures hold what the layers decided; `hamblocks show` prints it."""

import runpy
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from characters import CHARACTERS, character_tokenizer, tiny_llama
from typer.testing import CliRunner

import hamblocks as hb
from hamblocks.cli import app
from hamblocks.fates import fates_of
from hamblocks.models import HAMConfig, HAMForCausalLM
from hamblocks.ops import NEVER
from hamblocks.plot import (
    EVICTED,
    KEPT,
    PALE,
    STORED,
    plot_growth,
    plot_kept,
    plot_lives,
    plot_scores,
)

TEXT = "Two\tlines,\nand \x07."


def stats_of(*ends):
    """Decisions of one head about one sequence."""
    evict_at = torch.tensor(ends, dtype=torch.int32)[None, :, None]
    position = torch.arange(len(ends), dtype=torch.int32)[None]
    return hb.LayerStats(torch.rand(evict_at.shape), evict_at, position, None)


def images_of(figure):
    return [torch.tensor(image.get_array()) for axes in figure.axes for image in axes.images]


def characters_of(figure):
    return ["".join(text.get_text() for text in axes.texts) for axes in figure.axes]


def test_every_token_has_the_color_of_its_fate(tmp_path):
    ends = [NEVER, 1, 2, 3, 3, 99]
    figure = plot_kept(stats_of(*ends), ["a", "bc", "\n", "d", "", "ef"], columns=8)
    assert characters_of(figure) == ["abc↵", "d·ef"]
    first, second = images_of(figure)
    image = torch.cat([first[:, :4], second[:, :4]], 1)
    found = [tuple(round(x, 2) for x in color) for color in image[0].tolist()]
    assert found[0] == KEPT
    assert found[6] == found[7] == STORED
    # never stored: 1 at place 1, 2 at place 2, 3 at place 3; a token may occupy two columns
    assert found[1] == found[2] == found[3] == found[4] == EVICTED
    figure.savefig(tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes()[:4] == b"\x89PNG"


def test_evicted_tokens_are_bluer_the_longer_they_were_stored():
    # stored for 0, 1, 2 and 4 steps; the fifth is still stored
    figure = plot_kept(stats_of(0, 2, 4, 7, 99, NEVER, NEVER, NEVER), list("abcdefgh"), columns=8)
    (image,) = images_of(figure)
    blue = (image[0] - torch.tensor(EVICTED)).abs().sum(-1)
    assert blue[0] == 0
    assert (blue[1:5] > blue[:4] + 0.04).all()
    torch.testing.assert_close(image[0, 3], torch.tensor(PALE), rtol=0, atol=1e-3)
    torch.testing.assert_close(image[0, 4], torch.tensor(STORED), rtol=0, atol=1e-6)


def test_a_line_holds_so_many_characters_and_rows_are_layers_and_heads():
    torch.manual_seed(0)
    model = hb.Decoder(
        256, 3, lambda i: hb.HAMLayer(8, 4, num_kv_heads=2, selector=hb.TopK(3) | hb.Window(4))
    )
    out = model(torch.tensor([list(TEXT.encode())]))
    figure = plot_kept(out.stats, list(TEXT), columns=10)
    lines = ["Two", "→lines,↵", "and ·."]
    assert characters_of(figure) == lines
    images = images_of(figure)
    assert [image.shape[:2] for image in images] == [(6, 10)] * 3
    kept = fates_of(out.stats).is_kept.T
    drawn = [image[:, : len(line)] for image, line in zip(images, lines, strict=True)]
    red = (torch.cat(drawn, 1) - torch.tensor(KEPT)).abs().amax(-1) < 1e-6
    assert torch.equal(red, kept)
    # as many text characters are bold as most heads keep
    bold = [text.get_fontweight() == "bold" for axes in figure.axes for text in axes.texts]
    assert bold == (kept.float().mean(0) > 0.5).tolist()


@pytest.mark.parametrize(
    ("tokens", "lines"),
    [
        (list("to be or not"), ["to be or", " not"]),
        (["to", " be", " or not"], ["to be", " or not"]),
        (["\n", "a", "\n", "\n", "b\n"], ["↵", "a↵", "↵", "b↵"]),
        (["longer than eight"], ["longer t", "han eigh", "t"]),
        (["a", " longerthaneight"], ["a", " longert", "haneight"]),
        ([" ", " ", "x"], ["  x"]),
    ],
)
def test_a_line_ends_between_words(tokens, lines):
    figure = plot_kept(stats_of(*[NEVER] * len(tokens)), tokens, columns=8)
    assert characters_of(figure) == lines


@pytest.mark.parametrize(
    ("ends", "named"),
    [
        ([NEVER, 9, 2], ["stored for good", "still stored", "never stored"]),
        ([1, 9, NEVER], ["stored for good", "still stored", "evicted"]),
        ([2, NEVER, NEVER], ["stored for good", "evicted"]),
        ([NEVER, NEVER, NEVER], ["stored for good"]),
    ],
)
def test_the_legend_names_what_occurs_and_fits(ends, named):
    for columns in (16, 60):
        figure = plot_kept(stats_of(*ends), list("abc"), columns=columns)
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == named
        figure.canvas.draw()
        edge, lines = legend.get_window_extent(), figure.axes[0].get_window_extent()
        assert edge.y0 > lines.y1
        assert columns == 16 or edge.x1 <= figure.bbox.x1


def test_scores_and_what_is_kept():
    stats = stats_of(NEVER, 1, NEVER, 5)
    figure = plot_scores(stats, list("abcd"), threshold=0.5)
    (axes,) = figure.axes
    line, dots, level = axes.lines
    torch.testing.assert_close(torch.tensor(line.get_ydata()), stats.score[0, :, 0])
    assert list(dots.get_xdata()) == [0, 2]
    assert list(level.get_ydata()) == [0.5, 0.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcd")


def test_growth_is_a_line_for_every_label():
    figure = plot_growth({"all": stats_of(*[NEVER] * 4), "window of 2": stats_of(2, 3, 4, 5)})
    all_of_them, window, diagonal = figure.axes[0].lines
    assert list(all_of_them.get_ydata()) == [1, 2, 3, 4]
    assert list(window.get_ydata()) == [1, 2, 2, 2]
    assert list(diagonal.get_xdata()) == [0, 4]


def test_a_column_of_a_panel_is_what_a_query_reads():
    score = torch.rand(1, 9, 1, generator=torch.Generator().manual_seed(0))
    selectors = {"sinks and window": hb.FirstTokens(2) | hb.Window(3), "top": hb.TopK(2)}
    lives = {name: selector(score).evict_at[0, :, 0] for name, selector in selectors.items()}
    figure = plot_lives(lives, score=score[0, :, 0], mark=4, columns=2)
    first, *panels, unused = figure.axes
    assert [axes.get_title("left") for axes in figure.axes] == ["score", *selectors, ""]
    assert not unused.axison
    widths = torch.tensor([bar.get_width() for bar in first.patches])
    torch.testing.assert_close(widths, score[0, :, 0], check_dtype=False)
    position = torch.arange(9)
    for axes, life in zip(panels, lives.values(), strict=True):
        (image,) = (torch.tensor(image.get_array()) for image in axes.images)
        drawn = {
            name: (image - torch.tensor(color)).abs().amax(-1) < 1e-6
            for name, color in (("kept", KEPT), ("stored", STORED), ("gone", EVICTED))
        }
        begun = position[:, None] <= position
        seen = begun & (position < life[:, None])  # dense mask of concepts.md, keys in rows
        assert torch.equal(drawn["kept"] | drawn["stored"], seen)
        assert torch.equal(drawn["gone"], begun & ~seen)
        assert torch.equal(drawn["kept"].any(1), life == NEVER)
    assert [text.get_text() for text in panels[0].texts] == ["token 4:\nuntil 7"]
    (outline,) = panels[0].patches
    assert outline.get_bbox().bounds == (3.5, 3.5, 3, 1)


@pytest.mark.parametrize(
    ("end", "says", "outlines"), [(NEVER, "for good", 1), (1, "not stored", 0), (2, "until 2", 1)]
)
def test_the_end_of_a_marked_life(end, says, outlines):
    figure = plot_lives({"one": torch.tensor([0, end])}, mark=1)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == [f"token 1:\n{says}"]
    assert len(axes.patches) == outlines


def test_queries_that_do_not_read_are_pale():
    lives = {"all": torch.tensor([NEVER, 2, 3]), "some": torch.tensor([NEVER, 2, 3])}
    reads = {"some": torch.tensor([True, False, True])}
    figure = plot_lives(lives, reads=reads, columns=2)
    plain, gated = (axes.images[0].get_array() for axes in figure.axes)
    torch.testing.assert_close(torch.tensor(gated[:, ::2]), torch.tensor(plain[:, ::2]))
    pale = 0.25 * torch.tensor(plain[:2, 1]) + 0.75
    torch.testing.assert_close(torch.tensor(gated[:2, 1]), pale)
    assert (gated[2, 1] == 1).all()  # the token comes later


def test_the_picture_of_the_docs_has_every_policy_that_decides_what_is_stored():
    docs = Path(__file__).parents[1] / "docs"
    script = runpy.run_path(str(docs / "assets/lives.py"))
    lives = script["lives"]()
    for life in lives.values():
        assert life.shape == (script["TOKENS"],)
    shown = [name for name in lives if name not in script["PAGES"]["retrieval_heads"]]
    figure = script["draw"](shown, 2, script["scores"]())
    assert len(figure.axes) == len(shown) + 1
    page = " ".join((docs / "policies/index.md").read_text(encoding="utf-8").split())
    described = page[page.index("(../assets/lives.png)") : page.index("## Combinations")]
    assert [name for name in shown if f"**{name}**" not in described] == []


def test_every_policy_has_a_page_with_its_picture():
    docs = Path(__file__).parents[1] / "docs"
    pages = runpy.run_path(str(docs / "assets/lives.py"))["PAGES"]
    found = {page.stem for page in (docs / "policies").glob("*.md")} - {"index"}
    assert found == set(pages)
    for name in found:
        text = (docs / "policies" / f"{name}.md").read_text(encoding="utf-8")
        assert f"(../assets/lives/{name}.png)" in text, name
        assert "**When:**" in text, name
        assert (docs / "assets/lives" / f"{name}.png").exists(), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda one: plot_lives({}), r"^evict_at: expected lifetimes by label"),
        (lambda one: plot_lives(one), r"^evict_at: expected lifetimes by label"),
        (lambda one: plot_lives({"a": one.score}), r"^evict_at\['a'\]: expected integers \[T\]"),
        (
            lambda one: plot_lives({"a": torch.arange(2), "b": torch.arange(3)}),
            r"^evict_at: expected as many tokens under every label",
        ),
        (
            lambda one: plot_lives({"a": torch.arange(2)}, score=one.score),
            r"^score: expected a tensor \[2\]",
        ),
        (
            lambda one: plot_lives({"a": torch.arange(2)}, reads={"b": torch.ones(2)}),
            r"^reads: expected labels of evict_at \(a\), got 'b'",
        ),
        (
            lambda one: plot_lives({"a": torch.arange(2)}, reads={"a": torch.ones(2)}),
            r"^reads\['a'\]: expected bool \[T\]",
        ),
        (
            lambda one: plot_lives({"a": torch.arange(2)}, reads={"a": torch.ones(3).bool()}),
            r"^reads\['a'\]: expected bool \[2\]",
        ),
        (
            lambda one: plot_lives({"a": torch.arange(2)}, mark=2),
            r"^mark: expected a token in \[0, 2\), got 2",
        ),
        (
            lambda one: plot_lives({"a": torch.arange(2)}, columns=0),
            r"^columns: expected an integer",
        ),
        (lambda one: plot_kept(one, "ab"), r"^tokens: expected a list of texts, one for each"),
        (lambda one: plot_kept(one, ["a"]), r"^tokens: expected 2 tokens, as stats, got 1"),
        (lambda one: plot_kept(one, ["a", "b"], columns=2), r"^columns: expected an integer >= 8"),
        (lambda one: plot_scores(one, ["a"]), r"^tokens: expected 2 tokens, as stats, got 1"),
        (lambda one: plot_growth({}), r"^stats: expected decisions by label"),
        (lambda one: plot_growth(one), r"^stats: expected decisions by label"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(stats_of(1, NEVER))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of transformers, a model of hamblocks, a text and an empty one."""
    root = tmp_path_factory.mktemp("show")
    tiny_llama().save_pretrained(root / "llama")
    torch.manual_seed(0)
    config = HAMConfig(
        vocab_size=len(CHARACTERS),
        hidden_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
        layer_types=["linear_attention", "hybrid"],
        selector={"type": "top_k", "k": 5},
    )
    HAMForCausalLM(config).save_pretrained(root / "ham")
    for name in ("llama", "ham"):
        character_tokenizer().save_pretrained(root / name)
    (root / "text.txt").write_text("Stored for good?\nYes and no.\n")
    (root / "empty.txt").write_text("")
    return root


def show(folder, model, *options, text="text.txt"):
    given = ["show", str(folder / model), "--text", str(folder / text), *options]
    return CliRunner().invoke(app, given)


def test_show_prints_the_text_and_the_shares(folder, tmp_path):
    result = show(folder, "ham", "--tokens", "20", "--out", str(tmp_path / "kept.png"))
    assert result.exit_code == 0, result.output
    assert "Stored for good?" in result.output
    assert "Yes" in result.output
    assert "and" not in result.output.split("layer")[0]
    assert "25%" in result.output  # 5 of 20
    assert (tmp_path / "kept.png").read_bytes()[:4] == b"\x89PNG"


def test_show_attaches_a_policy_to_any_model(folder):
    options = ["--gate", "KeyNorm()", "--selector", "TopK(7)", "--layers", "1"]
    result = show(folder, "llama", *options, "--tokens", "28")
    assert result.exit_code == 0, result.output
    assert result.output.count("25%") == 4  # two heads, for good and at the end
    policy = '{"type": "window", "width": 4}'
    result = show(folder, "llama", "--selector", policy, "--tokens", "8")
    assert result.output.count("50%") == 2  # without scores all heads decide together


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("llama", [], "--selector: expected one, because this model stores everything"),
        ("ham", ["--selector", "TopK(3)"], "--selector: expected none beside a model of hamblocks"),
        ("llama", ["--gate", "KeyNorm()"], "--gate: expected one beside --selector"),
        ("ham", ["--layers", "0"], "stats: expected those of a layer with attention"),
        ("ham", ["--layers", "2"], "layers: expected"),
    ],
)
def test_show_says_what_is_wrong(folder, model, options, message):
    result = show(folder, model, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_show_needs_a_token(folder):
    result = show(folder, "ham", text="empty.txt")
    assert result.exit_code == 2
    assert "at least one token" in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    "draw",
    [
        lambda stats: plot_kept(stats, [], sequence=1),
        lambda stats: plot_scores(stats, sequence=1),
        lambda stats: plot_growth({"it": stats}, sequence=1),
    ],
    ids=["kept", "scores", "growth"],
)
def test_an_empty_sequence_of_a_packed_batch(draw):
    stats = stats_of(NEVER, 5)._replace(cu_seqlens=torch.tensor([0, 2, 2]))
    with pytest.raises(ValueError, match=r"^sequence: expected one with a token, got 1"):
        draw(stats)


def test_drawing_changes_no_setting_of_matplotlib():
    before = mpl.get_backend(), dict(mpl.rcParams)
    plot_kept(stats_of(1, NEVER), ["a", "b"])
    plot_growth({"a": stats_of(1, NEVER)})
    assert (mpl.get_backend(), dict(mpl.rcParams)) == before


def test_the_version():
    result = CliRunner().invoke(app, ["--version"])
    assert result.output == f"hamblocks {hb.__version__}\n"
