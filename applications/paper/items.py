"""The items of the page are the tables and figures of the paper, in the order of the page.

Each is a function that runs the stages it needs and returns its rows and pictures.
"""

from applications.paper import attacks, decisions, noise, section4, section5  # noqa: F401  they register their items
from applications.paper.registry import REGISTERED

ORDER = (
    "table1",
    "fig3",
    "fig9",
    "fig10",
    "fig4",
    "table2",
    "fig5",
    "fig8",
    "fig11",
    "noise",
    "deletion",
    "causal",
    "decisions",
    "table4",
    "table3",
    "table7",
)
ITEMS = {name: REGISTERED[name] for name in ORDER}
ALIASES = {
    "table5": "table2",
    "fig6": "table3",
    "fig15": "table3",
    "fig7": "table4",
    "fig12": "fig11",
    "fig13": "fig5",
    "fig14": "fig5",
}
