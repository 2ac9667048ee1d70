"""`sharebert report`: one page of what happened in a run, or in several side by side.

report     what stands on the page
run_data   what a run's folder says
curves     the plots, as SVG
page       headings, tables and plots as HTML or Markdown
"""
