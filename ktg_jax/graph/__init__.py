"""Knowledge transfer graphs: nodes, edges, and what makes two graphs the same."""
