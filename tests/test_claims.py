"The claims follow from rows: a changed row changes a verdict, nothing is typed."

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools import ROOT, papermill, run_cells

from lora_recycle.bench.claims import (
    CLAIMS,
    OUR_FINDING,
    PRINTED,
    STARTS,
    Claim,
    Drawing,
    Verdict,
    find_paper_figure,
    find_start,
    join_verdicts,
    judge_claim,
    judge_folder,
    list_starts,
)
from lora_recycle.bench.index import draw_claims, find_picture, judge_photos, map_places
from lora_recycle.bench.index import write_claims
from lora_recycle.bench.methods import METHODS, SCALES
from lora_recycle.bench.report import EXHIBITS
from lora_recycle.bench.results import (
    PAPER_TABLES,
    SUPPLEMENT,
    episode_key,
    paper_table,
    write_episodes,
    write_rows,
)
from lora_recycle.bench.runs import missing_parts, read_runs, seed_folder
from lora_recycle.bench.tables import TABLES

HOLDS, FAILS, OPEN = (v.value for v in Verdict)
QUICK = Drawing(resamples=400)


def write_invented(folder, gains, table='in_domain', seed=0, n=150, share=None):
    "Rows of each method of `gains`, that many points above 70 %; `share`: how many tasks it has."
    rng = np.random.default_rng(seed)
    counts, rows = {}, []
    for dataset, shot in (('greek', 1), ('greek', 5), ('math', 1), ('math', 5)):
        chance = rng.normal(70, 8, n)
        for name, gain in gains.items():
            right = rng.binomial(75, ((chance + gain) / 100).clip(0, 1))
            right = right[: (share or {}).get(name, n)]
            counts[episode_key(dataset, shot, name)] = right
            row = dict(table=table, scale='smoke', seed=seed, method=name, title=name)
            row |= dict(backbone='b', dataset=dataset, way=5, shot=shot, metric='accuracy')
            row |= dict(value=100 * right.mean() / 75, ci95=1.0, n_tasks=len(right), device='cpu')
            rows.append(row)
    out = seed_folder(folder, table, seed)
    write_rows(out, rows)
    write_episodes(out, counts, 75)
    return out


def judge_text(folder, text, shot=1, start='zero'):
    "The line of the claim `text` on the rows below `folder`."
    claim = next(c for c in CLAIMS if c.text == text)
    return judge_claim(claim, start, shot, read_runs(folder, claim.table), QUICK)


def test_there_are_enough_claims_and_none_says_what_comes_out():
    assert len(CLAIMS) >= 15 and {c.table for c in CLAIMS} <= {*PAPER_TABLES, *SUPPLEMENT}
    assert len({c.text for c in CLAIMS}) == len(CLAIMS)
    for c in CLAIMS:
        words = f'{c.text} {c.where}'.lower()
        assert not re.search(r'\b(holds?|fails?|open|confirmed|refuted|true|false)\b', words), words


def test_our_own_finding_is_a_claim():
    pairs = {pair[:2] for c in CLAIMS if c.where == OUR_FINDING for pair in c.pairs}
    assert ('average', 'recycle') in pairs and ('recycle', 'recycle-noise') in pairs


def test_a_claim_must_say_something_about_a_table():
    with pytest.raises(ValueError, match="'in_domain'"):
        Claim('x', 'Table 2', 'in_domian', (('recycle', 'nn', 0.0),))
    with pytest.raises(ValueError, match='no pairs'):
        Claim('x', 'Table 2', 'in_domain', ())
    with pytest.raises(ValueError, match='resamples=1'):
        judge_folder('/nowhere', Drawing(resamples=1))


def test_every_figure_of_the_paper_is_looked_up():
    unprinted = ('Fig. 9', 'Fig. 4', 'Supplement', OUR_FINDING)
    for c in CLAIMS:
        for shot in c.shots:
            found = find_paper_figure(c, shot)
            assert found is not None or c.where.startswith(unprinted), (c.text, shot)


def test_the_papers_figure_is_that_of_its_table():
    "By hand for one claim, from the rows of the paper"
    rows = paper_table(3).query("shot == 1 and metric == 'accuracy'")
    rows = rows.pivot(index='method', columns='dataset', values='value')
    by_hand = (rows.loc['LoRA Recycle'] - rows.loc['CAML']).mean()
    claim = next(c for c in CLAIMS if c.text == 'Across domains, recycling beats CAML')
    assert find_paper_figure(claim, 1) == pytest.approx(by_hand, abs=1e-9)


def test_the_paper_meets_its_own_claims():
    "A threshold that the printed numbers miss would be a claim that nobody made"
    for c in (c for c in CLAIMS if c.where != OUR_FINDING):
        for shot in c.shots:
            found = find_paper_figure(c, shot)
            least = min(margin for *_, margin in c.pairs)
            assert found is None or found > least, (c.text, shot, found)


def accuracy_claims():
    return [c for c in CLAIMS if c.table in TABLES and c.metric == 'accuracy']


@pytest.mark.parametrize('claim', accuracy_claims(), ids=lambda c: c.text)
def test_methods_of_a_claim_are_in_its_table(claim):
    table = TABLES[claim.table]
    ids = {i for *pair, _ in claim.pairs for i in pair if i != PRINTED}
    needed = {find_start(i, start) for i in ids for start in list_starts(claim)}
    assert needed <= set(table.methods), sorted(needed - set(table.methods))
    assert set(claim.shots) <= set(table.shots or (1, 5))


def test_a_start_changes_the_start_alone():
    for method in METHODS.values():
        if method.recipe is not None and method.recipe.added:
            assert find_start(method.id, 'average') == method.id, 'what is added starts at zero'
        elif method.recipe is not None and method.recipe.start in STARTS:
            other = METHODS[find_start(method.id, 'average')]
            assert other.recipe.start == 'average'
            assert METHODS[find_start(other.id, method.recipe.start)].id == method.id


def test_a_flipped_row_flips_the_verdict(tmp_path):
    text = 'In domain, recycling beats NN'
    for gains, verdict in (
        (dict(nn=0, recycle=4), HOLDS),
        (dict(nn=4, recycle=0), FAILS),
        (dict(nn=0, average=1), OPEN),
    ):
        write_invented(tmp_path, gains)
        assert judge_text(tmp_path, text)['verdict'] == verdict


def test_a_claim_is_as_strong_as_its_weakest_pair(tmp_path):
    text = 'On Meta-Dataset, recycling beats MOLE and LoRAHub'
    write_invented(tmp_path, dict(mole=0, lorahub=0, recycle=4), 'meta_dataset')
    assert judge_text(tmp_path, text)['verdict'] == HOLDS
    write_invented(tmp_path, dict(mole=0, lorahub=9, recycle=4), 'meta_dataset')
    found = judge_text(tmp_path, text)
    assert found['verdict'] == FAILS and found['pair'] == 'LoRA Recycle against LoRAHub'
    write_invented(tmp_path, dict(lorahub=9, recycle=4), 'meta_dataset')
    assert judge_text(tmp_path, text)['verdict'] == FAILS  # one pair is enough
    write_invented(tmp_path, dict(lorahub=0, recycle=4), 'meta_dataset')
    found = judge_text(tmp_path, text)
    assert found['verdict'] == OPEN and 'no rows of MOLE' in found['note']


def test_a_tolerance_has_two_sides(tmp_path):
    text = 'The weight of the prior hardly matters'
    for gain, verdict in ((0, HOLDS), (5, FAILS), (-5, FAILS)):
        gains = {'recycle': 0, 'recycle-alpha-0.002': 0, 'recycle-alpha-0.2': gain}
        write_invented(tmp_path, gains, 'alpha', n=5000)
        assert judge_text(tmp_path, text)['verdict'] == verdict, gain


def test_methods_with_fewer_tasks_are_compared_on_those(tmp_path):
    write_invented(tmp_path, dict(nn=0, recycle=6), share=dict(nn=24))
    found = judge_text(tmp_path, 'In domain, recycling beats NN')
    assert found['n_tasks'] == 24 and found['verdict'] == HOLDS


def test_seeds_widen_what_one_seed_hides(tmp_path):
    "Seeds that disagree: each alone is sure of itself, together they cannot tell"
    for seed, gain in enumerate((6, -4, 1)):
        write_invented(tmp_path, dict(nn=0, recycle=gain), seed=seed, n=600)
    found = judge_text(tmp_path, 'In domain, recycling beats NN')
    assert found['n_seeds'] == 3 and found['verdict'] == OPEN and 'one seed' not in found['note']
    for seed in (1, 2):
        for path in seed_folder(tmp_path, 'in_domain', seed).iterdir():
            path.unlink()
    one = judge_text(tmp_path, 'In domain, recycling beats NN')
    assert (one['n_seeds'], one['verdict']) == (1, HOLDS)
    assert one['note'] == 'one seed: episodes alone'


def test_every_backbone_of_a_table_is_judged(tmp_path):
    text = 'With every transformer, recycling beats LoRAHub'
    out = write_invented(tmp_path, dict(lorahub=0, recycle=4), 'backbones')
    run = read_runs(tmp_path, 'backbones')[0]
    rows = pd.concat([run.rows, run.rows.assign(backbone='c')])
    whole = {key: (0.75 * tasks).round().astype(int) for key, tasks in run.episodes.items()}
    write_rows(out, rows)
    write_episodes(out, {f'{key}|{b}': c for key, c in whole.items() for b in 'bc'}, 75)
    found = judge_text(tmp_path, text)
    assert found['verdict'] == HOLDS and found['pair'].endswith((', b', ', c'))


def test_rows_of_another_table_or_scale_are_refused(tmp_path):
    write_invented(tmp_path, dict(nn=0))
    (tmp_path / 'in_domain').rename(tmp_path / 'alpha')
    with pytest.raises(ValueError, match="of the table 'alpha'"):
        read_runs(tmp_path, 'alpha')
    out = write_invented(tmp_path, dict(nn=0))
    for name in ('rows.csv', 'episodes.npz'):
        (out / 'seed1').mkdir(exist_ok=True)
        (out / 'seed1' / name).write_bytes((out / name).read_bytes())
    with pytest.raises(ValueError, match='seed 0 of in_domain is in'):
        read_runs(tmp_path, 'in_domain')


def test_rows_and_episodes_of_two_runs_are_refused(tmp_path):
    out = write_invented(tmp_path, dict(nn=0))
    run = read_runs(tmp_path, 'in_domain')[0]
    write_episodes(out, {k: (v * 0.5).astype(int) for k, v in run.episodes.items()}, 75)
    with pytest.raises(ValueError, match='rows and episodes disagree'):
        read_runs(tmp_path, 'in_domain')


@given(st.lists(st.sampled_from(list(Verdict)), min_size=1))
def test_a_joint_verdict(verdicts):
    found = join_verdicts(verdicts)
    assert (found == FAILS) == (Verdict.FAILS in verdicts)
    assert (found == HOLDS) == (set(verdicts) == {Verdict.HOLDS})


def test_the_page_and_the_picture_show_every_line(tmp_path):
    write_invented(tmp_path, {'nn': 0, 'recycle': 4, 'recycle-average': -4})
    judged = judge_folder(tmp_path, Drawing(100))
    page = write_claims(judged)
    lines = page.split('Below, the')[1]
    n = sum(len(list_starts(c)) * len(c.shots) for c in CLAIMS)
    assert sum(lines.count(f'**{v.value}**') for v in Verdict) == len(judged) == n
    marks = '| In domain, recycling beats NN | Table 2 | 1-shot ✓ 5-shot ✓ | 1-shot ✗ 5-shot ✗ |'
    assert marks in page and '`smoke`' in page
    assert 'photos' not in page and '†' not in page
    rows = judged['table'].eq('in_domain')
    assert write_claims(judged, stale=('in_domain',)).count('** †') == rows.sum()
    photos = judged.assign(verdict=judged['verdict'].replace({'fails': 'holds'}))
    page = write_claims(judged, photos)
    assert marks[:-1] + '| 1-shot ✓ 5-shot ✓ | 1-shot ✓ 5-shot ✓ |' in page
    n = judged['difference'].notna().sum()
    fails = (judged['verdict'] == 'fails').sum()
    told = f'Of the {n} lines that glyphs have, too, {n - fails} have the same verdict and {fails}'
    assert told in page
    drawn = [t.get_text() for ax in draw_claims(judged).axes for t in ax.get_yticklabels()]
    assert [t.rsplit('  (', 1)[0] for t in drawn] == list(dict.fromkeys(judged['claim']))


def test_a_line_on_photos_is_of_the_run_with_most_seeds(tmp_path):
    "And one that a single run has is of that run."
    gains = {'nn': 0, 'recycle': 4}
    write_invented(tmp_path / 'photos', gains | {'average': 8})
    for seed in (0, 1):
        write_invented(tmp_path / 'photos' / 'quick', gains, seed=seed)
    found = judge_photos(tmp_path, Drawing(100)).set_index(['claim', 'shot'])['n_seeds']
    assert found['In domain, recycling beats NN', 1] == 2
    assert found['In domain, recycling beats LoRAs Avg + NN', 1] == 1
    assert not found.index.duplicated().any() and judge_photos(tmp_path / 'photos') is None


def test_every_table_and_figure_of_the_paper_has_a_place():
    places = ' '.join(p.paper for p in EXHIBITS)
    names = [f'Table {n}' for n in range(1, 15)] + [f'Figure {n}' for n in range(4, 10)]
    assert all(name in places for name in (*names, 'Figures 1-3'))
    assert {p.folder for p in EXHIBITS if p.paper.startswith('Table')} == set(PAPER_TABLES)


def test_the_map_is_the_generated_one():
    page = (ROOT / 'results' / 'README.md').read_text(encoding='utf-8')
    assert map_places(ROOT / 'results', ROOT / 'results') in page, 'run nbs/claims.ipynb'


@pytest.mark.parametrize('page', ['README.md', 'claims/table.md'])
def test_links_and_pictures_of_the_results_are_there(page):
    path = ROOT / 'results' / page
    text = path.read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)#\s]+)', text) + re.findall(r'<img[^>]*src="([^"]+)', text)
    for link in links:
        assert (path.parent / link).exists(), f'{path} links to {link}'


def test_the_kept_verdicts_follow_from_their_intervals():
    kept = pd.read_csv(ROOT / 'results' / 'claims' / 'claims.csv')
    assert set(kept['verdict']) <= {HOLDS, FAILS, OPEN}
    for r in kept.itertuples():
        if r.verdict == HOLDS:
            assert r.low > r.threshold
        if r.verdict == FAILS:
            assert r.high < r.threshold


def test_claims_by_one_command(tmp_path):
    write_invented(tmp_path, dict(nn=0, recycle=4))
    out = tmp_path / 'out'
    given = dict(results_dir=tmp_path, out_dir=out, resamples=100)
    run_cells('claims.ipynb', **given)
    names = {p.name for p in (out / 'claims').iterdir()}
    assert names >= {'claims.csv', 'claims.png', 'table.md', 'run.json'}
    assert (out / 'README.md').is_file()
    columns = ['claim', 'low', 'verdict']
    kept = pd.read_csv(out / 'claims' / 'claims.csv')[columns]
    again = judge_folder(tmp_path, Drawing(100))[columns]
    pd.testing.assert_frame_equal(kept, again, check_dtype=False)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "A cheap table that is there, and a second one by the command for all: what was made and said."
    folder = tmp_path_factory.mktemp('whole')
    runs = folder / 'runs'
    given = dict(scale='smoke', methods='nn', out_dir=runs, cache_dir=folder / 'cache')
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        run_cells('run_table.ipynb', table='alpha', **given)
    shutil.copy(ROOT / 'nbs' / 'run_table.ipynb', runs / 'alpha')  # in place of an executed copy
    before = (runs / 'alpha' / 'rows.csv').stat().st_mtime_ns
    both = dict(tables='alpha|interpolation', stories=False)
    made = papermill('run_all.ipynb', folder / 'all.ipynb', **both, **given)
    return runs, before, said.getvalue(), made.read_text()


def test_the_whole_set_by_one_command(whole):
    "The table that is complete is not made again, the other one goes on"
    runs, before, _, said = whole
    assert missing_parts(runs / 'alpha', 'alpha', 'smoke', 'nn') == []
    assert 'alpha 0 kept' in said and 'interpolation 0 made' in said
    assert (runs / 'alpha' / 'rows.csv').stat().st_mtime_ns == before
    index = (runs / 'README.md').read_text(encoding='utf-8')
    fourteen = next(line for line in index.splitlines() if line.startswith('| Table 14'))
    assert 'incomplete' in fourteen and '`alpha`: without' in index.split('## Incomplete')[1]
    assert find_picture(next(p for p in EXHIBITS if p.folder == 'alpha'), runs)
    assert (runs / 'claims' / 'claims.csv').is_file()


def test_a_page_begins_with_its_picture_and_names_no_machine(whole):
    runs, _, said, _ = whole
    page = (runs / 'alpha' / 'table.md').read_text(encoding='utf-8')
    assert page.startswith('# Table 14') and '![dots](dots.png)' in page.split('\n## ')[0]
    record = json.loads((runs / 'alpha' / 'run.json').read_text(encoding='utf-8'))
    assert record['config']['parameters']['cache_dir'] == '.cache'
    words = shlex.split(record['command'])
    assert words[words.index('out_dir') + 1] == str(runs) and words[0] == 'mkdir'
    assert {'precision', 'device', 'executor', 'seed', 'methods'} <= set(words)
    assert 'is published at this scale' in said or 'of the published ones' in said


def test_a_first_run_never_touches_what_is_published():
    done = subprocess.run(
        ['git', 'check-ignore', 'runs/in_domain/rows.csv'], cwd=ROOT, capture_output=True
    )
    assert done.returncode == 0
    for name in ('run_table', 'run_all'):
        cells = json.loads((ROOT / 'nbs' / f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
        tagged = next(c for c in cells if 'parameters' in c['metadata'].get('tags', []))
        assert "out_dir = 'runs'" in ''.join(tagged['source'])


def test_every_scale_of_the_rows_is_known():
    assert {run.scale for t in TABLES for run in read_runs(ROOT / 'results', t)} <= set(SCALES)
