"""Leave documents out.

clean          rules that look at one document: lengths, symbols, repetition, language
ngrams         hashes of word n-grams, for the three others
words          the words of a text, whatever its typography
dedup          documents that repeat an earlier one, exactly or nearly
decontaminate  documents that overlap with evaluation sets
"""
