"""GSM8K, grade-school word problems: the prompt and tags of the published GRPO runs, our own reading of the answers.

Splits: `test` is all 1,319 published test questions and refuses fewer, because a score on a part is not the benchmark's; a first part
may be asked with a limit. `reference` is the 400 questions of the reference run, in its order. `dev` is whatever the file holds.

Limits: the positions of `reference` count rows in the published order; the file's order is not checked, only its length.
Source: Cobbe et al. 2021, arXiv 2110.14168 (MIT licence).
"""

from collections.abc import Sequence
from dataclasses import replace

from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.evals.task import Item, asked
from garage.rewards.answers import Grade, grade_number, number
from garage.rewards.format import parse
from garage.specs.evals import TaskSpec

TEST_ROWS = 1319
INSTRUCTION = (
    "You are given a problem. Think about the problem and provide your reasoning. Place it between <reasoning> and </reasoning>. "
    "Then, provide the final answer (i.e., just one numerical value) between <answer> and </answer>."
)
REFERENCE = (
    1069, 1032, 1195, 524, 1258, 975, 241, 1084, 811, 669, 412, 278, 396, 563, 922, 1020, 1127, 208, 196, 308, 1050, 713, 947, 1140, 691,
    879, 1307, 1002, 1220, 668, 645, 1133, 1025, 710, 580, 588, 875, 551, 576, 1088, 113, 798, 1046, 44, 999, 192, 635, 1044, 848, 769, 17,
    11, 86, 351, 329, 615, 322, 19, 934, 677, 1312, 211, 562, 853, 411, 1042, 0, 776, 1194, 1059, 1213, 1240, 882, 1228, 210, 415, 560, 469,
    778, 448, 939, 859, 149, 902, 765, 154, 839, 751, 67, 1009, 757, 529, 729, 880, 974, 546, 50, 982, 908, 74, 1272, 611, 320, 1104, 490,
    474, 39, 251, 1073, 499, 876, 511, 633, 724, 1187, 675, 1011, 118, 168, 1196, 522, 334, 441, 468, 247, 865, 817, 862, 1005, 1273, 640,
    97, 819, 414, 395, 47, 703, 696, 989, 1090, 606, 605, 230, 581, 186, 927, 232, 818, 513, 233, 688, 743, 768, 310, 993, 844, 708, 184,
    133, 878, 860, 924, 62, 631, 570, 897, 852, 435, 820, 220, 1048, 45, 984, 483, 1014, 307, 161, 407, 470, 629, 126, 1254, 799, 403, 987,
    978, 188, 16, 1313, 1300, 40, 137, 1131, 553, 1061, 1277, 685, 354, 1071, 1056, 723, 257, 33, 701, 416, 1135, 863, 1278, 1291, 102, 842,
    49, 96, 368, 509, 745, 1269, 4, 503, 955, 170, 659, 440, 1113, 532, 479, 433, 1012, 802, 905, 80, 300, 1085, 163, 1116, 679, 215, 793,
    1223, 1198, 598, 1181, 187, 292, 42, 1156, 632, 144, 1132, 695, 887, 797, 504, 965, 1175, 616, 152, 150, 1004, 742, 988, 1000, 363, 471,
    205, 1305, 884, 43, 171, 945, 762, 796, 66, 430, 756, 694, 941, 1162, 1232, 46, 1183, 558, 140, 1292, 689, 378, 936, 1215, 609, 1246,
    872, 1129, 122, 1171, 406, 207, 1106, 358, 825, 1208, 657, 281, 455, 121, 94, 481, 780, 508, 55, 676, 1206, 593, 160, 35, 183, 239,
    1285, 721, 564, 365, 323, 419, 9, 1001, 1186, 667, 146, 716, 684, 946, 429, 1157, 813, 758, 547, 1039, 683, 1045, 275, 949, 1068, 371,
    244, 1306, 928, 1239, 384, 526, 258, 890, 893, 1234, 134, 617, 27, 242, 438, 929, 217, 665, 1225, 10, 871, 198, 1174, 453, 81, 449, 12,
    173, 256, 706, 832, 885, 1119, 795, 190, 1238, 410, 1248, 747, 89, 347, 1096, 1308, 60, 589, 943, 246, 719, 286, 142, 319, 456, 420,
    731, 520, 718, 305, 672,
)


class Gsm8k:
    """Items are rows {question, answer} whose answer ends in `#### gold`."""

    name = "gsm8k"
    extraction = "numbers-1: strict = the only answer block; lenient = answer tag, boxed, hashes, answer phrase, last number"

    def items(self, rows: Sequence[Row], spec: TaskSpec) -> list[Item]:
        """Raises UserError for an incomplete test file, an unknown split, or a row without a gold."""
        if spec.split not in ("test", "reference", "dev"):
            raise UserError(f"gsm8k has no split '{spec.split}'", remedy="give --split test, reference or dev")
        whole = spec.split == "reference" or (spec.split == "test" and spec.limit is None)
        if whole and len(rows) != TEST_ROWS:
            remedy = f"give the complete test file, or --limit {len(rows)} to ask a part and say so, or --split dev"
            raise UserError(f"{spec.data} has {len(rows)} rows; GSM8K's test split has {TEST_ROWS}", remedy=remedy)
        places = REFERENCE if spec.split == "reference" else range(len(rows))
        return [_item(place, *asked(rows[place])) for place in places]

    def score(self, text: str, gold: str) -> Grade:
        return replace(grade_number(text, gold), format_ok=parse(text) is not None)


def gold_of(answer: str) -> str:
    """The number after `####`, plainly written: sign kept, separators gone."""
    value = number(answer.partition("####")[2])
    if value is None:
        raise UserError(f"no number after #### in the answer {answer[-80:]!r}", remedy="repair the row: the answer ends in '#### 18'")
    return str(value)


def _item(place: int, messages: tuple[Message, ...], answer: str) -> Item:
    question = f"{INSTRUCTION}\n\n{messages[-1].content}"
    return Item(f"gsm8k-{place:04d}", (Message("user", question),), gold_of(answer))
