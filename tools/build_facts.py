"""Build the fact table of the bundled model ``tinyfacts``.

The table joins a hand-written list (``tools/own_facts.json``) with the true answers of three public data sets under
the MIT licence: KnowEdit (``wiki_counterfact`` and ``wiki_recent``), the LRE relations and CounterFact. The raw files
are read from the folder named by the environment variable ``EASYEDITOR_DATA``. The result is committed, so nobody
needs the raw files to train the model or to use it.

A fact enters the table if its relation has wordings in ``own_facts.json``, its answer is unique over all sources, and
its subject keeps at least three facts. Private traits are not in the list of relations and are filtered by word.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
TABLE_DIR = HERE.parent / "src" / "easyeditor" / "tinyfacts"

KNOWEDIT = {
    "The occupation of {} is": "occupation",
    "The name of the country of citizenship of {} is": "citizenship",
    "The place of birth of {} is": "birthplace",
    "The name of the alma mater of {} is": "alma_mater",
    "The name of the award {} won is": "award",
    "The name of the country which {} is associated with is": "country",
    "The place of death of {} is": "deathplace",
    "The name of the position held by {} is": "position_held",
    "The name of the employer of {} is": "employer",
    "{} follows": "follows",
    "{} is followed by": "followed_by",
    "The name of the sports team which {} is a member of is": "sports_team",
    "The name of the field of work of {} is": "field",
    "The name of the director of {} is": "director",
    "The name of the continent which {} is part of is": "continent",
    "The name of the composer of {} is": "composer",
    "The place of burial of {} is": "burial",
    "The name of the league which {} plays in is": "league",
    "The name of the screenwriter of {} is": "screenwriter",
    "The name of the country which {} is the capital of is": "capital_of",
    "The name of the author of {} is": "author",
    "The name of the capital city of {} is": "capital",
    "The official language of {} is": "official_language",
    "The name of the founder of {} is": "founder",
    "The name of the head of state of {} is": "head_of_state",
    "The name of the currency in {} is": "currency",
    "The name of the architect of {} is": "architect",
}
LRE = {
    "company CEO": "ceo",
    "company hq": "headquarters",
    "landmark in country": "country",
    "landmark on continent": "continent",
    "person native language": "native_language",
    "person occupation": "occupation",
    "person plays instrument": "instrument",
    "person sport position": "sport_position",
    "plays pro sport": "sport",
    "person university": "alma_mater",
    "president birth year": "birth_year",
    "president election year": "election_year",
    "product by company": "manufacturer",
    "superhero archnemesis": "archnemesis",
    "superhero person": "identity",
}
COUNTERFACT = {
    "P103": "native_language",
    "P413": "sport_position",
    "P641": "sport",
    "P1303": "instrument",
    "P27": "citizenship",
    "P19": "birthplace",
    "P20": "deathplace",
    "P106": "occupation",
    "P101": "field",
    "P136": "genre",
    "P176": "manufacturer",
    "P178": "manufacturer",
    "P449": "network",
    "P364": "original_language",
    "P407": "original_language",
    "P159": "headquarters",
    "P740": "formed_in",
    "P495": "country",
    "P17": "country",
    "P30": "continent",
    "P36": "capital",
    "P37": "official_language",
    "P937": "work_location",
    "P108": "employer",
    "P39": "position_held",
}
RENAMED = {"United States of America": "United States", "association football": "soccer"}
UNWANTED = re.compile(
    r"gay|lesbian|bisex|transg|lgbt|porn|criminal|murder|killer|terror|drug|prostitut|sex|nazi|holocaust|suicide"
    r"|christian|catholic|islam|muslim|jewish|jew\b|judaism|hindu|buddh|protestant|orthodox|church|pope|priest|bishop"
    r"|cardinal|rabbi|imam|pastor|theolog|saint|deacon|monk|nun\b|clergy|religio|atheis|cleric|party|communis|socialis"
    r"|fascis|disease|cancer|covid|pandemic|virus|ethnic|massacre|genocide|war criminal|list of|diaspora"
    r"|activist|george floyd|cartel|correctional|prophet|abbot|yeshiva|calvary|militant|schoolchild|gun control|tektōn"
    r"|celebrity|medical center|commune of|^football$|taxi driver|participant",
    re.IGNORECASE,
)
PLAIN = re.compile("^[A-Za-z0-9\u00c0-\u017f &'\u2019.,:!?/()-]+$")

Claim = tuple[str, str, str, tuple[str, ...], str]


def read_json(path: Path) -> object:
    """Read one JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def answer_groups(value: object) -> list[list[str]]:
    """Return the different answers of a KnowEdit field, each with its aliases first-named first."""
    if not value:
        return []
    if isinstance(value, str):
        return [[value]]
    groups = [[group] if isinstance(group, str) else list(group) for group in value]
    return [group for group in groups if group]


def knowedit_claims(folder: Path) -> Iterator[Claim]:
    """Yield the true answers of KnowEdit: the edited facts before the edit and the locality facts."""
    for name, truth in (
        ("wiki_counterfact_test_cf", "ground_truth"),
        ("wiki_counterfact_train_cf", "ground_truth"),
        ("wiki_recent_train", "target_new"),
    ):
        for record in read_json(folder / "knowedit" / f"{name}.json"):
            subject = record["subject"]
            pairs = [(record["prompt"], record.get(truth))]
            local = record.get("locality", {}).get("Relation_Specificity") or []
            pairs += [(item["prompt"], item["ground_truth"]) for item in local]
            for prompt, value in pairs:
                relation = KNOWEDIT.get(prompt.replace(subject, "{}"))
                if relation is not None:
                    for first, *others in answer_groups(value):
                        yield subject, relation, first, tuple(others), "KnowEdit"


def lre_claims(folder: Path) -> Iterator[Claim]:
    """Yield the triples of the LRE relations."""
    for path in sorted((folder / "relations" / "factual").glob("*.json")):
        data = read_json(path)
        relation = LRE.get(data["name"])
        if relation is not None:
            for sample in data["samples"]:
                yield sample["subject"], relation, sample["object"], (), "LRE"


def counterfact_claims(folder: Path) -> Iterator[Claim]:
    """Yield the true answers of CounterFact; the flat file has no relation, so its template decides."""
    templates: dict[str, set[str]] = defaultdict(set)
    claims = []
    for record in read_json(folder / "counterfact" / "counterfact.json"):
        rewrite = record["requested_rewrite"]
        templates[rewrite["prompt"]].add(rewrite["relation_id"])
        claims.append((rewrite["subject"], rewrite["relation_id"], rewrite["target_true"]["str"]))
    for record in read_json(folder / "counterfact" / "known_1000.json"):
        templates[record["template"].strip()].add(record["relation_id"])
        claims.append((record["subject"], record["relation_id"], record["attribute"]))
    for record in read_json(folder / "counterfact" / "counterfact-train.json"):
        ids = templates.get(record["prompt"].replace(record["subject"], "{}").strip(), set())
        if len(ids) == 1:
            claims.append((record["subject"], next(iter(ids)), record["ground_truth"]))
    for subject, code, answer in claims:
        if code in COUNTERFACT:
            yield subject, COUNTERFACT[code], answer, (), "CounterFact"


def own_claims(own: dict) -> Iterator[Claim]:
    """Yield the hand-written facts."""
    for subject, facts in own["facts"].items():
        for relation, answer in facts.items():
            yield subject, relation, answer, tuple(own["aliases"].get(answer, ())), "own"


def own_support(own: dict) -> list[dict]:
    """Return the hand-written facts that only support the training."""
    return [
        {"subject": subject, "relation": relation, "answer": answer, "source": "own"}
        for subject, facts in own["support"].items()
        for relation, answer in facts.items()
    ]


def clean(text: str) -> str:
    """Return the text with single spaces and without a closing full stop of a phrase."""
    return " ".join(text.replace("\u2019", "'").split())


def acceptable(subject: str, relation: str, answer: str, wordings: dict) -> bool:
    """Tell whether a fact is short, plain, public in nature and not given away by its own prompt."""
    if UNWANTED.search(subject) or UNWANTED.search(answer):
        return False
    if not PLAIN.match(subject) or not PLAIN.match(answer):
        return False
    if len(subject) > 36 or len(answer) > 34 or len(subject.split()) > 6 or len(answer.split()) > 5:
        return False
    if len(subject) < 3 or answer.endswith(".") or not (subject[0].isupper() or subject[0].isdigit()):
        return False
    if answer.lower() in subject.lower() or subject.lower() in answer.lower():
        return False
    templates = wordings["trained"] + wordings["held_out"]
    return not any(re.search(rf"\b{re.escape(answer.lower())}\b", t.lower()) for t in templates)


def unique_facts(claims: Iterable[Claim], own: dict) -> dict[tuple[str, str], dict]:
    """Join the claims and keep one fact per subject and relation, only where all sources agree.

    A subject of the hand-written list keeps its own answers; other sources add nothing to it. The list
    also names subjects to leave out: ambiguous names, and people known for a crime or as its victims.
    """
    relations, subjects_of_own, left_out = own["relations"], set(own["facts"]), set(own["left_out"])
    answers: dict[tuple[str, str], dict[str, dict]] = defaultdict(dict)
    for subject, relation, answer, aliases, source in claims:
        subject, answer = clean(subject), clean(answer)
        answer = RENAMED.get(answer, answer)
        if relation not in relations or subject in left_out:
            continue
        entry = {"subject": subject, "relation": relation, "answer": answer, "source": source}
        known = answers[subject, relation].setdefault(answer.lower(), {**entry, "aliases": []})
        names = [clean(alias) for alias in aliases if PLAIN.match(alias) and clean(alias) != answer]
        known["aliases"] = list(dict.fromkeys(known["aliases"] + names))[:6]
    facts = {}
    for key, found in answers.items():
        own = [fact for fact in found.values() if fact["source"] == "own"]
        if own:
            facts[key] = own[0]
        elif len(found) == 1 and key[0] not in subjects_of_own:
            fact = next(iter(found.values()))
            if acceptable(*key, fact["answer"], relations[key[1]]):
                facts[key] = fact
    return facts


def without_lone_relations(facts: list[dict], least_answers: int, least_facts: int) -> list[dict]:
    """Drop relations with too few facts or answers, and then subjects with fewer than three facts, until stable."""
    while True:
        answers, sizes = defaultdict(set), Counter()
        for fact in facts:
            answers[fact["relation"]].add(fact["answer"])
            sizes[fact["relation"]] += 1
        per_subject = Counter(fact["subject"] for fact in facts)
        kept = [
            fact
            for fact in facts
            if per_subject[fact["subject"]] >= 3
            and len(answers[fact["relation"]]) >= least_answers
            and sizes[fact["relation"]] >= least_facts
        ]
        if len(kept) == len(facts):
            return kept
        facts = kept


def choose_subjects(facts: list[dict], own: dict, wanted: int, per_subject: int) -> tuple[list[dict], list[dict]]:
    """Split the facts into those of the chosen subjects and those of the rest.

    Subjects with many facts and short names come first; the hand-written ones are always chosen.
    """
    groups: dict[str, list[dict]] = defaultdict(list)
    for fact in facts:
        groups[fact["subject"]].append(fact)

    def rank(subject: str) -> tuple:
        group = groups[subject]
        sources = {fact["source"] for fact in group}
        return subject not in own["facts"], -min(len(group), 4) - (len(sources) > 1), len(subject), subject

    order = sorted(groups, key=rank)
    table = [fact for subject in order[:wanted] for fact in groups[subject][:per_subject]]
    rest = [fact for subject in order[wanted:] for fact in groups[subject][:per_subject]]
    return table, rest


def finish(facts: list[dict], own: dict, seed: int) -> list[dict]:
    """Give every fact its id, its half (drawn per subject) and its extra prompts."""
    rng = random.Random(seed)
    subjects = sorted({fact["subject"] for fact in facts})
    rng.shuffle(subjects)
    halves = {subject: ("tuning", "reporting")[index % 2] for index, subject in enumerate(subjects)}
    prompts = {(subject, relation): extra for subject, relation, extra in own["prompts"]}
    done = []
    for number, fact in enumerate(sorted(facts, key=lambda fact: (fact["subject"], fact["relation"]))):
        row = {"id": f"f{number:04d}", **{key: fact[key] for key in ("subject", "relation", "answer")}}
        if fact["aliases"]:
            row["aliases"] = fact["aliases"]
        row["source"] = fact["source"]
        row["half"] = halves[fact["subject"]]
        if (fact["subject"], fact["relation"]) in prompts:
            row["prompts"] = prompts[fact["subject"], fact["relation"]]
        done.append(row)
    return done


def support_facts(rest: list[dict], extra: list[dict], relations: Iterable[str], per_relation: int) -> list[dict]:
    """Return facts outside the table, in the order given: with them the model learns the held-out wordings."""
    counts: Counter = Counter()
    chosen = []
    for fact in rest + extra:
        if counts[fact["relation"]] < per_relation and fact["relation"] in relations:
            counts[fact["relation"]] += 1
            chosen.append({key: fact[key] for key in ("subject", "relation", "answer", "source")})
    return chosen


def write_lines(path: Path, rows: list[dict]) -> None:
    """Write one JSON object per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def build(folder: Path, out: Path, subjects: int, per_subject: int, seed: int) -> None:
    """Read the sources and write ``facts.jsonl``, ``support.jsonl`` and ``relations.json``."""
    own = read_json(HERE / "own_facts.json")
    relations = own["relations"]
    claims = [*own_claims(own), *knowedit_claims(folder), *lre_claims(folder), *counterfact_claims(folder)]
    every = list(unique_facts(claims, own).values())
    table, rest = choose_subjects(without_lone_relations(every, 4, 5), own, subjects, per_subject)
    table = without_lone_relations(table, 4, 5)
    named = {fact["subject"] for fact in table}
    used = named | set(own["support"])
    rest = [fact for fact in rest if fact["subject"] not in used]
    others = sorted((f for f in every if f["subject"] not in used), key=lambda f: (len(f["subject"]), f["subject"]))
    kept = {fact["relation"] for fact in table}
    rows = finish(table, own, seed)
    support = support_facts(own_support(own) + rest, others, kept, 14)
    out.mkdir(parents=True, exist_ok=True)
    write_lines(out / "facts.jsonl", rows)
    write_lines(out / "support.jsonl", support)
    lines = [f'  "{name}": {json.dumps(relations[name], ensure_ascii=False)}' for name in relations if name in kept]
    (out / "relations.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    sizes = Counter(row["relation"] for row in rows)
    print(f"{len(rows)} facts, {len(named)} subjects, {len(kept)} relations, {len(support)} support facts")
    print(f"sources {dict(Counter(row['source'] for row in rows))}, halves {dict(Counter(r['half'] for r in rows))}")
    helped = Counter(row["relation"] for row in support)
    for name, size in sizes.most_common():
        answers = len({row["answer"] for row in rows if row["relation"] == name})
        print(f"  {name}: {size} facts, {answers} answers, {helped[name]} support")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE_DIR, help="folder for the table")
    parser.add_argument("--subjects", type=int, default=700, help="number of subjects")
    parser.add_argument("--per-subject", type=int, default=6, help="most facts of one subject")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split into halves")
    args = parser.parse_args()
    if "EASYEDITOR_DATA" not in os.environ:
        parser.error("set EASYEDITOR_DATA to the folder with the raw sources")
    build(Path(os.environ["EASYEDITOR_DATA"]), args.out, args.subjects, args.per_subject, args.seed)


if __name__ == "__main__":
    main()
