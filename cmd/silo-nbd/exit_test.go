package main

import (
	"bufio"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/stretchr/testify/require"
)

// TestExitCodesAreThoseOfTheTable holds the table of the README against the
// program, line by line: each line is the first of a script in testdata/exit,
// which provokes it (fault X1).
func TestExitCodesAreThoseOfTheTable(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(readme), "\n## Exit codes\n")
	require.True(t, found)
	section, _, _ = strings.Cut(section, "\n## ")
	table := regexp.MustCompile(`(?m)^\| (\d+|other) \|.*\|$`).FindAllString(section, -1)
	require.Greater(t, len(table), 8)
	scripts, err := filepath.Glob("testdata/exit/*.txtar")
	require.NoError(t, err)
	var provoked []string
	for _, script := range scripts {
		file, err := os.Open(script)
		require.NoError(t, err)
		lines := bufio.NewScanner(file)
		require.True(t, lines.Scan(), script)
		provoked = append(provoked, strings.TrimPrefix(lines.Text(), "# "))
		require.NoError(t, file.Close())
	}
	require.ElementsMatch(t, table, provoked)
	testscript.Run(t, params("testdata/exit", ""))
}
