"""Who is compared, by benchmark. These modules import little at the top: the start of their processes is measured too."""
