package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
)

// TestDocumentedTestsExist: docs/NBD.md says which test holds it to a claim.
func TestDocumentedTestsExist(t *testing.T) {
	have := make(map[string]bool)
	for _, dir := range []string{"pkg/nbdexport", "pkg/lazy", "pkg/storage/sources", "integration"} {
		files, err := filepath.Glob(filepath.Join("../..", dir, "*_test.go"))
		require.NoError(t, err)
		for _, file := range files {
			source, err := os.ReadFile(file)
			require.NoError(t, err)
			for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(source, -1) {
				have[string(m[1])] = true
			}
		}
	}
	text, err := os.ReadFile("../../docs/NBD.md")
	require.NoError(t, err)
	named := regexp.MustCompile(`\bTest[A-Z]\w+`).FindAllString(string(text), -1)
	require.Greater(t, len(named), 30)
	for _, name := range named {
		require.True(t, have[name], "docs/NBD.md names %s, which does not exist", name)
	}
}

// TestFlagsAreDocumented: a flag of any command but demo stands in the README, OPERATIONS.md or CONTROL.md.
func TestFlagsAreDocumented(t *testing.T) {
	var text strings.Builder
	for _, file := range []string{"README.md", "docs/OPERATIONS.md", "docs/CONTROL.md"} {
		b, err := os.ReadFile(filepath.Join("../..", file))
		require.NoError(t, err)
		text.Write(b)
	}
	for _, cmd := range newRootCommand().Commands() {
		if cmd.Name() == "demo" {
			continue
		}
		cmd.Flags().VisitAll(func(f *pflag.Flag) {
			require.Regexp(t, `--`+f.Name+`\b`, text.String(), "silo-nbd %s --%s", cmd.Name(), f.Name)
		})
	}
}
