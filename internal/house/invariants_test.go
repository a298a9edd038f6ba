package house

import (
	"os"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
)

func TestEveryInvariantNamesTestsThatExist(t *testing.T) {
	wrong, err := CheckInvariants(os.DirFS("../.."))
	require.NoError(t, err)
	require.Empty(t, wrong, strings.Join(wrong, "\n"))
}

func TestWhatIsWrongWithTheInvariantsIsFound(t *testing.T) {
	table := "| code | claim | tests |\n| --- | --- | --- |\n" +
		"| L1 | kept | `TestKept` |\n| L2 | lost | `TestLost` |\n| L3 | untested | by reading |\n| L1 | again | `TestKept` |\n"
	root := fstest.MapFS{
		"docs/INVARIANTS.md": {Data: []byte(table)},
		"pkg/a/a_test.go":    {Data: []byte("package a\n\nfunc TestKept(t *testing.T) {}\n")},
		"pkg/a/a.go":         {Data: []byte("package a\n\n// f is safe (traps L1, L9 and M3; fault L1).\nfunc f() {}\n")},
	}
	wrong, err := CheckInvariants(root)
	require.NoError(t, err)
	require.Equal(t, []string{
		"docs/INVARIANTS.md: L2 names TestLost, which does not exist",
		"docs/INVARIANTS.md: L3 names no test",
		"docs/INVARIANTS.md: L1 has two rows",
		"pkg/a/a.go: L9 has no row in docs/INVARIANTS.md",
		"pkg/a/a.go: M3 has no row in docs/INVARIANTS.md",
	}, wrong)
}
