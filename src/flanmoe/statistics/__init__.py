"""What the experts of a model do with some data: one pass, one file that mixing, pruning and tuning read."""

from flanmoe.statistics.batches import StatisticsBatch as StatisticsBatch
from flanmoe.statistics.batches import share_of_rank as share_of_rank
from flanmoe.statistics.collect import collect as collect
from flanmoe.statistics.expert_statistics import ExpertStatistics as ExpertStatistics
from flanmoe.statistics.layer_statistics import LayerStatistics as LayerStatistics
from flanmoe.statistics.logit_sample import LogitSample as LogitSample
from flanmoe.statistics.memory import held_bytes as held_bytes
from flanmoe.statistics.output_sums import OutputSums as OutputSums
from flanmoe.statistics.parts import StatisticsParts as StatisticsParts
