"""Networks of the papers, as their authors' software defined them."""
