"""Which data sets there are: the one list that reading, the command line and the documents share."""

from __future__ import annotations

from dataclasses import dataclass

from easyeditor.data.akew import AKEW, AKEW_TEXTS
from easyeditor.data.cknowedit import CKNOWEDIT
from easyeditor.data.conceptedit import CONCEPTEDIT
from easyeditor.data.conflictedit import CONFLICTEDIT, ROUNDEDIT
from easyeditor.data.convsent import CONVSENT
from easyeditor.data.counterfact import COUNTERFACT
from easyeditor.data.halluedit import HALLUEDIT
from easyeditor.data.knowedit import KNOWEDIT
from easyeditor.data.longform import LEME
from easyeditor.data.mquake import MQUAKE
from easyeditor.data.multitask import MULTITASK
from easyeditor.data.own import OWN
from easyeditor.data.personality import PERSONALITY
from easyeditor.data.qaedit import QAEDIT
from easyeditor.data.records import Layout
from easyeditor.data.relations import RELATIONS
from easyeditor.data.safeedit import SAFEEDIT
from easyeditor.data.sanitation import SANITATION
from easyeditor.data.unke import UNKE
from easyeditor.data.wikibigedit import WIKIBIGEDIT
from easyeditor.data.zsre import ZSRE
from easyeditor.errors import UsageError, did_you_mean


@dataclass(frozen=True)
class DataSet:
    """A data set that can be read.

    Args:
        name: What to call it on the command line.
        layout: How its records are written down.
        reader: The class that reads it as a sequence of dicts.
        task: What an edit of it is.
        size: How many edits the full files hold; None: not stated.
        licence: As stated where it is published.
        where: Where to get the full files.
        groups: The names of its locality probes, then those of its portability probes.
        hub: Whether its hub id can be given in the place of a file; that takes the extra ``data``.
    """

    name: str
    layout: Layout
    reader: str | None
    task: str
    size: str | None
    licence: str
    where: str
    groups: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    hub: bool = False

    @property
    def extra(self) -> str | None:
        """The extra that is needed to fetch it by its hub id."""
        return "data" if self.hub else None


# In the order in which they are looked for: a layout comes before those whose fields are among its own.
DATA_SETS = (
    DataSet(
        "multitask",
        MULTITASK,
        "MultiTaskDataset",
        "edits of several tasks, each behind an instruction (InstructEdit)",
        None,
        "MIT",
        "hub: zjunlp/KnowEdit; examples/InstructEdit.md of zjunlp/EasyEdit",
        (
            ("Relation_Specificity", "Forgetfulness", "unrelated_topic"),
            ("Reasoning", "Subject_Aliasing", "Logical_Generalization"),
        ),
    ),
    DataSet(
        "leme",
        LEME,
        "LongFormEditDataset",
        "CounterFact and zsRE, with passages to be written at length",
        None,
        "MIT",
        "github: domenicrosati/longform-evaluation-model-editing",
        (
            ("neighborhood", "attribute", "unrelated", "longform_coupled_entities"),
            ("longform_subject", "personas", "multi_hop"),
        ),
    ),
    DataSet(
        "akew",
        AKEW,
        "AKEWUnifiedDataset",
        "facts that are also told as a paragraph; here the facts",
        None,
        "none stated",
        "github: jianghoucheng/AnyEdit (data/AKEW)",
        (("neighborhood", "unrelated", "neighbour_hops"), ("multi_hop", "multi_hop_of_all_edits")),
    ),
    DataSet(
        "akew-unstructured",
        AKEW_TEXTS,
        "AKEWUnifiedDataset",
        "the same; here the paragraphs (only with --as)",
        None,
        "none stated",
        "github: jianghoucheng/AnyEdit (data/AKEW)",
        (("unrelated", "neighbour_hops"), ("sub_question", "multi_hop", "multi_hop_of_all_edits")),
    ),
    DataSet(
        "counterfact",
        COUNTERFACT,
        "CounterFactDataset",
        "counterfactual answers; with its added files",
        "21,919",
        "MIT",
        "rome.baulab.info/data",
        (("neighborhood", "attribute", "distracting", "other_attribute"), ("one_hop", "subject_replace")),
    ),
    DataSet(
        "mquake",
        MQUAKE,
        "MQuAKEDataset",
        "edits whose consequences are asked along a chain of facts",
        "3,000 cases (CF-3k), 1,868 (T)",
        "MIT",
        "github: princeton-nlp/MQuAKE",
        (("neighbour_hops",), ("multi_hop", "multi_hop_of_all_edits")),
    ),
    DataSet(
        "zsre",
        ZSRE,
        "ZsreDataset",
        "questions with a new answer; with their added files",
        "19,086",
        "MIT",
        "rome.baulab.info/data",
        (("unrelated",), ("one_hop", "inverse_relation", "subject_replace")),
    ),
    DataSet(
        "wikibigedit",
        WIKIBIGEDIT,
        "WikiBigEditDataset",
        "real changes of Wikidata in eight snapshots; also UltraEditBench",
        "502,382",
        "Apache-2.0",
        "hub: lukasthede/WikiBigEdit",
        (("neighborhood",), ("personas", "multi_hop")),
        hub=True,
    ),
    DataSet(
        "safeedit",
        SAFEEDIT,
        "SafetyDataset",
        "a safe answer in the place of an unsafe one",
        "about 8,600",
        "CC BY-NC-SA 4.0",
        "hub: zjunlp/SafeEdit",
        (
            ("general knowledge constraint",),
            ("only_question", "other_attack", "other_question", "other_question_and_attack"),
        ),
        hub=True,
    ),
    DataSet(
        "conceptedit",
        CONCEPTEDIT,
        "ConceptEditDataset",
        "the definition of a concept becomes another one's",
        "452 concepts",
        "CC BY-NC-SA 4.0",
        "hub: zjunlp/ConceptEdit",
        (("neighborhood",), ("instance",)),
    ),
    DataSet(
        "cknowedit",
        CKNOWEDIT,
        "CKnowEditDataset",
        "Chinese knowledge: verse, idioms, sounds, places, traps of logic",
        "700 (CCKS 2024)",
        "none stated",
        "hub: zjunlp/CKnowEdit",
        (("neighborhood",), ("reasoning",)),
    ),
    DataSet(
        "knowedit",
        KNOWEDIT,
        "KnowEditDataset",
        "new and changed facts, counterfactual ones, hallucinated biographies",
        "1,266 recent, 885 counterfact, 1,301 zsRE, 306 WikiBio",
        "MIT",
        "hub: zjunlp/KnowEdit",
        (("Relation_Specificity", "Forgetfulness"), ("Reasoning", "Subject_Aliasing", "Logical_Generalization")),
    ),
    DataSet(
        "qaedit",
        QAEDIT,
        "QAEditDataset",
        "questions of NQ, TriviaQA and SimpleQA that models get wrong",
        "about 19,200",
        "Apache-2.0",
        "hub: WenDingY/QAEdit",
        (("unrelated",), ()),
        hub=True,
    ),
    DataSet(
        "unke",
        UNKE,
        "UnKEDataset",
        "answers a paragraph long",
        "1,000",
        "none stated",
        "github: TrustedLLM/UnKE",
        ((), ("sub_question",)),
    ),
    DataSet(
        "halluedit",
        HALLUEDIT,
        "HalluEditBenchDataset",
        "what a model got wrong, corrected; 26 topics",
        "more than 6,000",
        "MIT",
        "github: llm-editing/HalluEditBench",
        (("same_subject",), ("yes", "no", "mcq", "reversed", "2hop", "3hop", "4hop", "5hop", "6hop")),
    ),
    DataSet(
        "convsent",
        CONVSENT,
        "ConvSentDataset",
        "the sentiment towards a topic (KnowEdit)",
        "800",
        "MIT",
        "hub: zjunlp/KnowEdit",
        (("unrelated_topic",), ()),
    ),
    DataSet(
        "personality",
        PERSONALITY,
        "PersonalityDataset",
        "opinions as one of three personalities holds them",
        "2,000 topics",
        "MIT",
        "github: zjunlp/EasyEdit",
        (("unrelated_topic",), ()),
    ),
    DataSet(
        "sanitation",
        SANITATION,
        "SanitizationTrainDataset",
        "answers to forget, and to keep (KnowEdit)",
        "80",
        "MIT",
        "hub: zjunlp/KnowEdit",
        (("unrelated",), ()),
    ),
    DataSet(
        "lre",
        RELATIONS,
        "RelationsDataset",
        "true triples by relation, each made into an edit",
        "9,696 factual",
        "MIT",
        "github: evandez/relations",
        (("neighborhood",), ()),
    ),
    DataSet(
        "conflictedit",
        CONFLICTEDIT,
        "ConflictEditDataset",
        "two edits that contradict each other, directly or by a rule",
        "7,500 pairs per model",
        "MIT",
        "github: zjunlp/PitfallsKnowledgeEditing",
        (("prerequisite",), ("reverse", "composite")),
    ),
    DataSet(
        "roundedit",
        ROUNDEDIT,
        "ConflictEditDataset",
        "an edit there and back, of a fact with several true answers",
        "5,000 pairs per model",
        "MIT",
        "github: zjunlp/PitfallsKnowledgeEditing",
        ((), ("true_objects",)),
    ),
    DataSet(
        "own",
        OWN,
        None,
        "records of your own: prompt, target_new, and what else you have",
        None,
        "yours",
        "JSON, JSON lines or CSV; docs/data.md",
        (("neighborhood", "... or your names"), ("one_hop", "... or your names")),
    ),
)


def data_set(name: str) -> DataSet:
    """A data set by its name.

    Raises:
        UsageError: There is none.
    """
    found = next((each for each in DATA_SETS if each.name == name.lower()), None)
    if found is None:
        names = [each.name for each in DATA_SETS]
        raise UsageError(f"There is no data set '{name}'. {did_you_mean(name, names)}")
    return found
