"The claims follow from rows: a changed row changes a verdict, nothing is typed, and one command makes everything again."

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_recycle.bench.claims import (
    CLAIMS,
    FAILS,
    HOLDS,
    EXHIBITS,
    UNTOLD,
    VERDICTS,
    at_start,
    bootstrap,
    claims_page,
    forest,
    joint,
    judge_claim,
    judge_claims,
    missing_parts,
    paper_figure,
    picture_of,
    place_map,
    read_runs,
    seed_folder,
)
from lora_recycle.core import generator
from lora_recycle.bench.methods import label
from lora_recycle.bench.results import (
    COLUMNS,
    PAPER_TABLES,
    SUPPLEMENT,
    episode_key,
    paper_table,
    write_episodes,
    write_rows,
)
from lora_recycle.bench.tables import TABLES

ROOT = Path(__file__).resolve().parent.parent
PAPERMILL = [sys.executable, '-m', 'papermill']


def rows_of(
    folder,
    gains,
    table='in_domain',
    seed=0,
    sets=('greek', 'math'),
    shots=(1, 5),
    n=150,
    metric='accuracy',
    below='',
    share=None,
):
    "Write invented rows to `folder`/`table`/`below`: each method of `gains` that many points above 70 %; `share`: how many tasks each method has."
    rng, rows, counts = np.random.default_rng(seed), [], {}
    for dataset in sets:
        for shot in shots:
            chance = rng.normal(70, 8, n)
            for name, gain in gains.items():
                method, variant = (name.split(', ', 1) + [''])[:2]
                right = rng.binomial(75, ((chance + gain) / 100).clip(0, 1))[
                    : (share or {}).get(name, n)
                ]
                counts[episode_key(dataset, shot, method, variant)] = right
                rows.append(
                    {
                        **dict.fromkeys(COLUMNS),
                        **dict(
                            table=table,
                            method=method,
                            variant=variant,
                            backbone='invented',
                            dataset=dataset,
                            way=5,
                            shot=shot,
                            metric=metric,
                            value=100 * right.mean() / 75,
                            ci95=1.0,
                            n_tasks=len(right),
                            seed=seed,
                            scale='smoke',
                            seconds=1.0,
                            device='cpu',
                            created='2025-01-01',
                        ),
                    }
                )
    out = Path(folder) / table / below
    write_rows(out, rows)
    write_episodes(out, counts, 75)
    return out


def line(folder, text, shot=1, start=''):
    "The verdict line of the claim `text` on the rows below `folder`."
    claim = next(c for c in CLAIMS if c.text == text)
    return judge_claim(
        claim, start, shot, read_runs(folder, claim.table), 400, generator(0, 'test')
    )


def test_there_are_enough_claims_and_none_says_what_comes_out():
    assert len(CLAIMS) >= 15 and {c.table for c in CLAIMS} <= {*PAPER_TABLES, *SUPPLEMENT}
    for c in CLAIMS:
        said = ' '.join((c.text, c.where, *(s.text for s in c.statements))).lower()
        assert not any(v in said for v in VERDICTS) and not re.search(
            r'\b(holds?|confirmed|refuted|true|false)\b', said
        ), c.text


def test_every_figure_of_the_paper_is_looked_up():
    for c in CLAIMS:
        for shot in c.shots:
            found = paper_figure(c, shot)
            assert (found is None) == c.where.startswith(('Fig. 9', 'Supplement')), (c.text, shot)


def test_the_papers_figure_is_that_of_its_table():
    "By hand for one claim, from the rows of the paper"
    rows = (
        paper_table(3)
        .query("shot == 1 and metric == 'accuracy'")
        .pivot(index='method', columns='dataset', values='value')
    )
    gaps = [
        (rows.loc['LoRA Recycle'] - rows.loc[m]).mean() for m in ('NN', 'LoRAs Avg + NN', 'CAML')
    ]
    assert paper_figure(
        next(
            c
            for c in CLAIMS
            if c.text == 'Across domains, recycling beats every tuning-free method'
        ),
        1,
    ) == pytest.approx(min(gaps), abs=1e-9)


def test_the_paper_meets_its_own_claims():
    "A threshold that the printed numbers miss would be a claim that nobody made"
    for c in CLAIMS:
        for shot in c.shots:
            found = paper_figure(c, shot)
            assert found is None or found > min(s.margin for s in c.statements), (
                c.text,
                shot,
                found,
            )


@pytest.mark.parametrize(
    'claim',
    [c for c in CLAIMS if c.table in TABLES and c.metric == 'accuracy'],
    ids=lambda c: c.text,
)
def test_labels_are_those_of_the_tables(claim):
    table = TABLES[claim.table]
    known = {
        label(*m, end)
        for m in table.methods
        for end in (table.backbones if len(table.backbones) > 1 else ('',))
    }
    needed = {
        at_start(name, start)
        for s in claim.statements
        for name in (s.ours, s.base)
        for start in claim.starts
    }
    assert needed <= known, sorted(needed - known)
    assert set(claim.shots) <= set(table.shots or (1, 5))


def test_a_flipped_row_flips_the_verdict(tmp_path):
    rows_of(tmp_path, {'NN': 0, 'LoRA Recycle': 4})
    assert line(tmp_path, 'In domain, recycling beats NN')['verdict'] == HOLDS
    rows_of(tmp_path, {'NN': 4, 'LoRA Recycle': 0})
    assert line(tmp_path, 'In domain, recycling beats NN')['verdict'] == FAILS
    rows_of(tmp_path, {'NN': 0, 'LoRA Recycle': 0})
    assert line(tmp_path, 'In domain, recycling beats NN')['verdict'] in VERDICTS
    rows_of(tmp_path, {'NN': 0, 'LoRAs Avg + NN': 1})
    assert line(tmp_path, 'In domain, recycling beats NN')['verdict'] == UNTOLD


def test_a_claim_is_as_strong_as_its_weakest_pair(tmp_path):
    rivals = dict.fromkeys(('NN', 'LoRAs Avg + NN', 'CAML'), 0)
    text = 'Across domains, recycling beats every tuning-free method'
    rows_of(tmp_path, {**rivals, 'LoRA Recycle': 4}, 'cross_domain')
    assert line(tmp_path, text)['verdict'] == HOLDS
    rows_of(tmp_path, {**rivals, 'CAML': 9, 'LoRA Recycle': 4}, 'cross_domain')
    found = line(tmp_path, text)
    assert found['verdict'] == FAILS and found['pair'] == 'LoRA Recycle against CAML'
    rows_of(tmp_path, {'NN': 0, 'CAML': 9, 'LoRA Recycle': 4}, 'cross_domain')
    assert line(tmp_path, text)['verdict'] == FAILS  # one pair is enough, whatever is missing
    rows_of(tmp_path, {'NN': 0, 'CAML': 0, 'LoRA Recycle': 4}, 'cross_domain')
    found = line(tmp_path, text)
    assert found['verdict'] == UNTOLD and 'no rows of LoRAs Avg + NN' in found['note']


def test_a_tolerance_has_two_sides(tmp_path):
    names = ('LoRA Recycle, alpha_R=0.002', 'LoRA Recycle, alpha_R=0.2')
    text = 'The weight of the prior hardly matters'
    for gain, expected in ((0, HOLDS), (5, FAILS), (-5, FAILS)):
        rows_of(tmp_path, {'LoRA Recycle': 0, names[0]: 0, names[1]: gain}, 'alpha', n=5000)
        assert line(tmp_path, text)['verdict'] == expected, gain


def test_methods_with_fewer_tasks_are_compared_on_those(tmp_path):
    rows_of(tmp_path, {'NN': 0, 'LoRA Recycle': 6}, share={'NN': 24})
    found = line(tmp_path, 'In domain, recycling beats NN')
    assert found['n_tasks'] == 24 and found['verdict'] == HOLDS


def test_seeds_widen_what_one_seed_hides(tmp_path):
    "Seeds that disagree: each alone is sure of itself, together they cannot tell"
    for seed, gain in enumerate((6, -4, 1)):
        rows_of(
            tmp_path,
            {'NN': 0, 'LoRA Recycle': gain},
            seed=seed,
            below=f'seed{seed}' if seed else '',
            n=600,
        )
    all = line(tmp_path, 'In domain, recycling beats NN')
    assert all['n_seeds'] == 3 and all['verdict'] == UNTOLD and 'one seed' not in all['note']
    for seed in (1, 2):
        for path in (tmp_path / 'in_domain' / f'seed{seed}').iterdir():
            path.unlink()
    one = line(tmp_path, 'In domain, recycling beats NN')
    assert (
        one['n_seeds'] == 1
        and one['verdict'] == HOLDS
        and one['note'] == 'one seed: episodes alone'
    )


def test_rows_of_another_table_or_scale_are_refused(tmp_path):
    rows_of(tmp_path, {'NN': 0})
    (tmp_path / 'in_domain').rename(tmp_path / 'alpha')
    with pytest.raises(ValueError, match="of the table 'alpha'"):
        read_runs(tmp_path, 'alpha')
    rows_of(tmp_path, {'NN': 0})
    rows_of(tmp_path, {'NN': 0}, below='seed1')
    with pytest.raises(ValueError, match='seed 0 of in_domain is in'):
        read_runs(tmp_path, 'in_domain')


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.integers(2, 60), st.floats(-5, 5), st.integers(0, 10)
)
def test_bootstrap_is_an_interval_around_the_mean(n_seeds, n_sets, n_tasks, shift, seed):
    rng = np.random.default_rng(seed)
    d = [
        [rng.integers(-5, 6, n_tasks).astype(float) for _ in range(n_sets)] for _ in range(n_seeds)
    ]
    mean, low, high = bootstrap(d, 200, generator(seed))
    assert low <= high and mean == pytest.approx(
        np.mean([np.mean([x.mean() for x in sets]) for sets in d])
    )
    moved = bootstrap([[x + shift for x in sets] for sets in d], 200, generator(seed))
    assert np.allclose(
        np.array(moved) - shift, (mean, low, high), atol=0.2 * (high - low) + 1e-6
    )  # values that round together may be drawn in another order


@given(st.lists(st.sampled_from(VERDICTS), min_size=1))
def test_joint_verdict(verdicts):
    found = joint(verdicts)
    assert (found == FAILS) == (FAILS in verdicts) and (found == HOLDS) == (
        set(verdicts) == {HOLDS}
    )


def test_the_page_and_the_picture_show_every_line(tmp_path):
    rows_of(tmp_path, {'NN': 0, 'LoRA Recycle': 4, 'LoRA Recycle, start at zero': -4})
    judged = judge_claims(tmp_path, resamples=100)
    page = claims_page(judged)
    details = page.split('Below, the')[1]
    assert (
        sum(details.count(f'**{v}**') for v in VERDICTS)
        == len(judged)
        == sum(len(c.starts) * len(c.shots) for c in CLAIMS)
    )
    assert (
        '| In domain, recycling beats NN | Table 2 | 1-shot ✓ 5-shot ✓ | 1-shot ✗ 5-shot ✗ |'
        in page
        and '(smoke)' in page
    )
    drawn = [t.get_text() for ax in forest(judged).axes for t in ax.get_yticklabels()]
    assert [t.rsplit('  (', 1)[0] for t in drawn] == list(dict.fromkeys(judged['claim']))


def test_every_table_and_figure_of_the_paper_has_a_place():
    places = ' '.join(p.paper for p in EXHIBITS)
    assert (
        all(f'Table {n}' in places for n in range(1, 15))
        and 'Figures 1-3' in places
        and all(f'Figure {n}' in places for n in range(4, 10))
    )
    assert {p.folder for p in EXHIBITS if p.paper.startswith('Table')} == set(PAPER_TABLES)
    assert all((ROOT / 'nbs' / p.notebook).is_file() for p in EXHIBITS if p.notebook)


@pytest.mark.parametrize('page', ['README.md', 'results/README.md'])
def test_the_map_is_the_generated_one(page):
    path = ROOT / page
    if not path.is_file() or '| paper | what it shows | here |' not in path.read_text(
        encoding='utf-8'
    ):
        pytest.skip('the page has no map yet')
    assert place_map(path.parent, ROOT / 'results', ROOT) in path.read_text(encoding='utf-8'), (
        'run nbs/claims.ipynb; copy the map of lora_recycle.bench.claims.place_map into README.md'
    )


def test_links_and_pictures_of_the_results_are_there():
    for path in (ROOT / 'results' / 'README.md', ROOT / 'results' / 'claims' / 'table.md'):
        if not path.is_file():
            pytest.skip('nbs/claims.ipynb has not been run yet')
        for link in re.findall(r'\]\(([^)#\s]+)', path.read_text(encoding='utf-8')) + re.findall(
            r'<img[^>]*src="([^"]+)', path.read_text(encoding='utf-8')
        ):
            assert (path.parent / link).exists(), f'{path} links to {link}'


def test_the_kept_verdicts_follow_from_their_intervals():
    path = ROOT / 'results' / 'claims' / 'claims.csv'
    if not path.is_file():
        pytest.skip('nbs/claims.ipynb has not been run yet')
    for r in pd.read_csv(path).itertuples():
        if r.verdict == HOLDS:
            assert r.low > r.threshold or r.low == r.high > r.threshold
        if r.verdict == FAILS:
            assert r.high < r.threshold or r.low == r.high <= r.threshold


def papermill(name, folder, **given):
    "Execute nbs/`name`.ipynb: exit status and what it said."
    command = [
        *PAPERMILL,
        f'nbs/{name}.ipynb',
        str(folder / f'{name}.ipynb'),
        '--no-progress-bar',
        '--log-output',
        *(w for k, v in given.items() for w in ('-p', k, str(v))),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    return done.returncode, done.stdout + done.stderr


def test_claims_by_one_command(tmp_path):
    rows_of(tmp_path, {'NN': 0, 'LoRA Recycle': 4})
    code, said = papermill(
        'claims', tmp_path, results_dir=tmp_path, out_dir=tmp_path / 'out', resamples=100
    )
    assert code == 0, said[-3000:]
    made = {p.name for p in (tmp_path / 'out' / 'claims').iterdir()}
    assert (
        made >= {'claims.csv', 'claims.png', 'table.md', 'run.json'}
        and (tmp_path / 'out' / 'README.md').is_file()
    )
    pd.testing.assert_frame_equal(
        pd.read_csv(tmp_path / 'out' / 'claims' / 'claims.csv')[['claim', 'low', 'verdict']],
        judge_claims(tmp_path, resamples=100)[['claim', 'low', 'verdict']],
        check_dtype=False,
    )


def test_the_whole_set_by_one_command(tmp_path):
    "Two cheap tables; the one that is complete is not made again, the other one goes on"
    given = dict(
        scale='smoke', methods='NN', out_dir=tmp_path / 'results', cache_dir=tmp_path / 'cache'
    )
    code, said = papermill('run_all', tmp_path, tables='alpha', **given)
    assert code == 0 and 'alpha 0 made' in said, said[-3000:]
    assert (
        missing_parts(seed_folder(tmp_path / 'results', 'alpha', 0), 'alpha', 'smoke', 'NN') == []
    )
    before = (tmp_path / 'results' / 'alpha' / 'rows.csv').stat().st_mtime_ns
    code, said = papermill('run_all', tmp_path, tables='alpha|interpolation', **given)
    assert code == 0 and 'alpha 0 kept' in said and 'interpolation 0 made' in said, said[-3000:]
    assert (tmp_path / 'results' / 'alpha' / 'rows.csv').stat().st_mtime_ns == before
    index = (tmp_path / 'results' / 'README.md').read_text(encoding='utf-8')
    assert 'without LoRA Recycle' in index.split('## Table 14')[1].split('\n## ')[0] and picture_of(
        next(p for p in EXHIBITS if p.folder == 'alpha'), tmp_path / 'results'
    )
    assert (tmp_path / 'results' / 'claims' / 'claims.csv').is_file()
