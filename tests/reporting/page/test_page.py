"""The page: what it holds, that it needs nothing else, and that it works in a browser."""

import re

import pytest

pytest.importorskip("vl_convert", reason="the report's plots need vl-convert-python")

from fasc.reporting.page.write import report
from tests.reporting.page.conftest import HOSTILE, write_run

LIMIT = 5_000_000
"""Bytes of a page."""


@pytest.fixture
def page(run):
    return report(run)


def test_a_report_is_a_page_a_text_and_every_plot_twice(page, run):
    assert page == run / "report.html"
    assert page.stat().st_size < LIMIT
    text = (run / "report.md").read_text()
    assert "| fasc@params0.8 |" in text and "lama, by type" in text
    drawn = {file.name for file in (run / "figures" / "report").iterdir()}
    assert {"kl-by-bytes.svg", "kl-by-multiply-adds.png", "lama-by-bytes.svg", "lama-by-type.png"} <= drawn
    assert {name[:-4] for name in drawn if name.endswith(".svg")} == {name[:-4] for name in drawn if name.endswith(".png")}
    for place in re.findall(r"!\[.*?\]\((.+?)\)", text):
        assert (run / place).is_file()


def test_a_page_fetches_nothing_and_may_not(page):
    html = page.read_text()
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert "default-src 'none'" in html and "unsafe-eval" not in html
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!#|data:)""", outside)


def test_what_a_model_wrote_is_shown_as_text(page, browse):
    found, _ = browse(page, "return [document.title, [...document.querySelectorAll('.texts dd')].map((e) => e.textContent)];")
    assert found[0].startswith("What compression kept")
    assert HOSTILE in found[1]


def test_every_plot_is_drawn_and_the_console_is_silent(page, browse):
    script = """
      const before = document.querySelectorAll('.plot svg').length;
      document.querySelectorAll('details').forEach((one) => { one.open = true; });
      document.querySelectorAll('input[name=measure]').forEach((one) => one.click());
      dispatchEvent(new Event('beforeprint'));
      await pause(600);
      const plots = [...document.querySelectorAll('.plot')];
      return [before, plots.length, plots.filter((one) => one.querySelector('svg') && one.querySelector('[tabindex]')).length];
    """
    (before, plots, drawn), said = browse(page, script)
    assert said == []
    assert 0 < before < plots == drawn


def test_a_title_sorts_its_column_both_ways_and_says_so(page, browse):
    script = """
      const table = document.querySelector('#comparison'), heads = [...table.tHead.rows[0].cells];
      const place = heads.findIndex((one) => one.textContent.startsWith('KL'));
      const read = () => [...table.tBodies[0].rows].map((row) => row.cells[place].dataset.key ?? null);
      const press = () => { heads[place].querySelector('button').focus(); document.activeElement.click(); };
      press(); const up = [read(), heads[place].ariaSort]; press();
      return [up, [read(), heads[place].ariaSort], document.querySelector('#sorted').textContent];
    """
    ((up, one), (down, other), words), _ = browse(page, script)
    assert (one, other) == ("ascending", "descending")
    assert up[-1] is None and down[-1] is None, "the dense model has no KL, and stays last"
    numbers = [[float(value) for value in values if value is not None] for values in (up, down)]
    assert numbers[0] == sorted(numbers[0]) == numbers[1][::-1]
    assert "KL" in words and "descending" in words


def test_marks_tell_their_values_to_the_pointer_and_to_the_keyboard(page, browse):
    script = """
      const plot = document.querySelector('#heatmap'), tip = document.querySelector('#tip');
      const marks = [...plot.querySelectorAll('[tabindex]')];
      const box = marks[3].getBoundingClientRect();
      const how = { bubbles: true, clientX: box.x + 3, clientY: box.y + 3 };
      for (const kind of ['pointerover', 'mouseover', 'pointermove', 'mousemove']) marks[3].dispatchEvent(new MouseEvent(kind, how));
      await pause(50);
      const hovered = [tip.hidden, tip.textContent];
      marks[0].focus();
      const first = [tip.hidden, tip.textContent, marks[0].getAttribute('aria-label')];
      marks[0].dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', bubbles: true }));
      const second = [tip.hidden, tip.textContent, document.activeElement.getAttribute('aria-label')];
      dispatchEvent(new KeyboardEvent('keydown', { key: 'Escape' }));
      const stops = plot.querySelectorAll('[tabindex="0"]').length;
      return [hovered, first, second, tip.hidden, stops];
    """
    (hovered, first, second, gone, stops), said = browse(page, script)
    assert said == []
    for hidden, *words in (hovered, first, second):
        assert not hidden and "block" in words[0] and "kind" in words[0]
    assert first[2] != second[2] and second[2].startswith("block ")
    assert gone and stops == 1


def test_the_heat_map_shows_what_is_chosen_and_the_same_as_a_table(page, browse):
    script = """
      const field = document.querySelector('#field'), subject = document.querySelector('#subject'), found = [];
      for (const option of [...field.options].map((one) => one.value)) {
        field.value = option; field.dispatchEvent(new Event('change')); await pause(150);
        found.push([option, subject.options.length, document.querySelectorAll('#heatmap [tabindex]').length,
          document.querySelectorAll('#where-table td').length]);
      }
      return found;
    """
    found, _ = browse(page, script)
    assert {"rho", "loss", "rank"} <= {row[0] for row in found}
    for _, subjects, squares, cells in found:
        assert subjects >= 1 and 0 < squares <= cells


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_themes_have_words_that_can_be_read(page, browse, theme):
    """Contrast of text, by the formula of WCAG 2.1, of at least 4.5."""
    script = f"""
      document.documentElement.dataset.theme = '{theme}';
      const light = (colour) => colour.match(/[\\d.]+/g).slice(0, 3).map((part) => part / 255)
        .map((part) => (part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
        .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
      const behind = (one) => {{ while (one && getComputedStyle(one).backgroundColor === 'rgba(0, 0, 0, 0)') one = one.parentElement;
        return getComputedStyle(one || document.body).backgroundColor; }};
      return [...document.querySelectorAll('h1, p, a, dd, dt, td, th, small, button, summary, .plot text')].filter((one) => one.offsetParent || one.closest('svg')).map((one) => {{
        const style = getComputedStyle(one), pair = [light(one.closest('svg') ? style.fill : style.color), light(behind(one))].sort((a, b) => b - a);
        return [(pair[0] + 0.05) / (pair[1] + 0.05), one.tagName, one.textContent.slice(0, 30)];
      }}).sort((a, b) => a[0] - b[0]).slice(0, 3);
    """
    worst, _ = browse(page, script)
    assert worst[0][0] >= 4.5, worst


def test_a_phone_scrolls_only_downwards(page, browse):
    script = "return [document.documentElement.scrollWidth, innerWidth];"
    (wide, window), said = browse(page, script, size=(500, 900))
    assert said == []
    assert wide <= window


def test_every_plot_and_control_has_a_name(page, browse):
    script = """
      const named = (one) => one.ariaLabel || one.textContent.trim() || (one.labels && one.labels.length);
      return [[...document.querySelectorAll('button, select, input, summary, .scroll')].filter((one) => !named(one)).length,
        [...document.querySelectorAll('.plot svg')].filter((one) => !(one.ariaLabel || one.closest('[aria-label]'))).length,
        document.querySelectorAll('h1').length, new Set([...document.querySelectorAll('[id]')].map((one) => one.id)).size - document.querySelectorAll('[id]').length];
    """
    found, _ = browse(page, script)
    assert found == [0, 0, 1, 0]


def test_several_runs_stand_in_one_page_with_names_of_their_own(run, measured, tmp_path):
    other = write_run(tmp_path / "second", measured, fractions=(0.8,))
    page = report(run, other, out=tmp_path / "both")
    html = page.read_text()
    assert "first: fasc@params0.8" in html and "second: fasc@params0.8" in html and "fasc@params0.5" in html
    assert html.count('<tr class="dense">') == 1, "both runs scored the same dense model alike"
    assert not (run / "report.html").exists()
