"""Turns image-caption pairs in common formats into records.

sources/      read the formats: a source is divided into parts, and a part yields items
images        decodes, converts and resizes one image
filters       decides which items pass
stage         part -> its records in a file, and a summary of what happened to its items
layout        the summaries of all parts -> duplicates, splits and the records of each shard
shards        one shard -> its file
finishing     indices, tfds's metadata, the report, the data card and the manifest
card          the data card
run           all of these in order, on local processes or on Beam workers
"""
