"""The stages of make_embedded_pair.py: the donor's training, the effect of every graft, the cards."""
