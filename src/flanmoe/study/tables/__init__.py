"""The tables of a report, as text cells: the same ones in the terminal, in Markdown and in HTML."""

from flanmoe.study.report_data import ReportData
from flanmoe.study.tables.base import Section as Section
from flanmoe.study.tables.base import TextTable as TextTable
from flanmoe.study.tables.claims import claims_section
from flanmoe.study.tables.costs import costs, memory
from flanmoe.study.tables.data import data_section
from flanmoe.study.tables.effects import effects_section
from flanmoe.study.tables.scores import clusters, comparisons, tasks
from flanmoe.study.tables.summary import summary as summary
from flanmoe.study.tables.training import curves, pretraining, routing, versions


def sections(data: ReportData) -> tuple[Section, ...]:
    """The parts that can be unfolded, leaving out those that the data has nothing for."""
    everything = (
        claims_section(data),
        effects_section(data),
        comparisons(data),
        clusters(data),
        tasks(data),
        data_section(data),
        pretraining(data),
        costs(data),
        memory(data),
        routing(data),
        curves(data),
        versions(data),
    )
    return tuple(section for section in everything if any(table.rows for table in section.tables))
