"""Model cards and the Hub: what is known of a run, its card, and how a folder gets there."""

from simcse_trainer import attach_lazily

__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "CardData": "card_data",
        "HubFailure": "errors",
        "HubSettings": "client",
        "RunInfo": "run_info",
        "push_folder": "client",
        "render_card": "model_card",
    },
)
